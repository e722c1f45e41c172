// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// How far ahead the source is fetched; see stream_amd64.s.
#define AHEAD 4096

// STNP, the store of a pair past the caches, is unknown to Go's assembler. Of two 16-byte registers to 0 and 32 bytes after R0.
#define STNP_F0_F1_0R0  WORD $0xac000400
#define STNP_F2_F3_32R0 WORD $0xac010c02

#define COPY64 \
	FLDPQ.P 32(R1), (F0, F1); \
	FLDPQ.P 32(R1), (F2, F3); \
	STNP_F0_F1_0R0;           \
	STNP_F2_F3_32R0;          \
	ADD     $64, R0

// func streamLines(dst, src, next uintptr, bytes uint64)
TEXT ·streamLines(SB), NOSPLIT, $0-32
	MOVD dst+0(FP), R0
	MOVD src+8(FP), R1
	MOVD next+16(FP), R2
	MOVD bytes+24(FP), R3
	SUBS $AHEAD, R3, R4
	BLE  last

	MOVD $AHEAD, R3

here: // R4 bytes whose ahead is in this run
	PRFM AHEAD(R1), PLDL2KEEP
	COPY64
	SUBS $64, R4
	BNE  here

last: // R3 bytes whose ahead is in the next run
	PRFM (R2), PLDL2KEEP
	ADD  $64, R2
	COPY64
	SUBS $64, R3
	BNE  last
	RET

// func streamFence()
TEXT ·streamFence(SB), NOSPLIT, $0-0
	DMB $0xa // ISHST
	RET
