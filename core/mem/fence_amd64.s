// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func LoadFence()
TEXT ·LoadFence(SB), NOSPLIT, $0-0
	// The processor keeps loads in their order; that this is a call keeps the compiler to it.
	RET

// func FullFence()
TEXT ·FullFence(SB), NOSPLIT, $0-0
	MFENCE
	RET

// func pause()
TEXT ·pause(SB), NOSPLIT, $0-0
	MOVL $10, CX

again:
	PAUSE
	SUBL $1, CX
	JNZ  again
	RET
