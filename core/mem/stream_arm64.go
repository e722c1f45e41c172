// SPDX-License-Identifier: Apache-2.0

package mem

// streamStep is what streamLines copies at a time.
const streamStep = 64

// haveStreams says whether this machine has streaming stores: each arm64 has them, as a hint.
const haveStreams = true

// streamLines copies bytes, which are a multiple of streamStep and more than 0, to dst, which is a multiple of streamAlign.
// It can't be preempted, so that a call stays within copyChunk.
func streamLines(dst, src, next uintptr, bytes uint64)

// streamFence makes all streaming stores before it visible before any store after it.
func streamFence()
