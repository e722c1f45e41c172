// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func LoadFence()
TEXT ·LoadFence(SB), NOSPLIT, $0-0
	DMB $0x9 // ISHLD
	RET

// func FullFence()
TEXT ·FullFence(SB), NOSPLIT, $0-0
	DMB $0xb // ISH
	RET

// func pause()
TEXT ·pause(SB), NOSPLIT, $0-0
	MOVD $10, R0

again:
	ISB  $15 // waits longer than YIELD, which most do nothing for
	SUBS $1, R0
	BNE  again
	RET
