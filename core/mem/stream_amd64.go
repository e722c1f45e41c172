// SPDX-License-Identifier: Apache-2.0

package mem

import "golang.org/x/sys/cpu"

// streamStep is what streamLines copies at a time.
const streamStep = 128

// haveStreams says whether this machine has streaming stores that are wide enough to be fast.
var haveStreams = cpu.X86.HasAVX

// streamLines copies bytes, which are a multiple of streamStep and more than 0, to dst, which is a multiple of streamAlign.
// It can't be preempted, so that a call stays within copyChunk.
func streamLines(dst, src, next uintptr, bytes uint64)

// streamFence makes all streaming stores before it visible before any store after it.
func streamFence()
