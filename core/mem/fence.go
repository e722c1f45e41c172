// SPDX-License-Identifier: Apache-2.0

//go:build amd64 || arm64

package mem

// Go's atomics order what they touch, and plain accesses only as far as a lock's users need it. Whoever reads memory that another process
// may reuse needs these.

// LoadFence returns when all loads before it are done; no load after it has begun.
func LoadFence()

// FullFence returns when everything before it is visible; nothing after it has begun.
func FullFence()

// pause tells the processor that we spin, for some 0.1 to 0.5 us.
func pause()
