// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 && !arm64

package mem

import "sync/atomic"

// LoadFence returns when all loads before it are done; no load after it has begun.
func LoadFence() { FullFence() }

// FullFence returns when everything before it is visible; nothing after it has begun. A read-modify-write of Go's is a full barrier on
// each architecture that has no assembly here.
//
//go:noinline
func FullFence() {
	var word atomic.Uint32
	word.Add(1)
}

// pause tells the processor that we spin.
func pause() {}
