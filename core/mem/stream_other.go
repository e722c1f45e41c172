// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 && !arm64

package mem

const (
	streamStep  = 64
	haveStreams = false
)

func streamLines(dst, src, _ uintptr, bytes uint64) { copy(View(dst, bytes), View(src, bytes)) }

func streamFence() {}
