// SPDX-License-Identifier: Apache-2.0

package cache

import "sync/atomic"

// holds counts who uses an entry's memory, and knows whether the entry is gone, in one word, so that "the last one has let go" is
// seen by exactly one of them, without a lock on the path of every system call.
//
//	bit 63      withdrawn: out of the table; nobody new comes in, except system calls under a lease
//	bit 62      revoked: withdrawn for good; not even those
//	bits 31-61  leases
//	bits 0-30   busy: system calls under way and local operations
type holds struct {
	word atomic.Uint64
	idle chan struct{} // closed when the entry is revoked and not busy; one transition, since a revoked entry gets no busier
}

const (
	withdrawn = uint64(1) << 63
	revoked   = uint64(1) << 62
	oneLease  = uint64(1) << 31
	oneBusy   = uint64(1)
	busyMask  = oneLease - 1
	leaseMask = revoked - oneLease
	heldMask  = leaseMask | busyMask
)

// add counts a hold on an entry that is in the table. Called with Table.mu held, so that the entry isn't withdrawn in between.
func (h *holds) add(one uint64) { h.word.Add(one) }

// enter counts a system call, or says that none may begin.
func (h *holds) enter(leased bool) bool {
	for {
		word := h.word.Load()
		if word&revoked != 0 || word&withdrawn != 0 && (!leased || word&leaseMask == 0) {
			return false
		}
		if h.word.CompareAndSwap(word, word+oneBusy) {
			return true
		}
	}
}

// leave ends a hold. It is the last one of a withdrawn entry when last is true: the memory is the caller's to give back then. When
// quiet is true the caller closes idle, after that.
func (h *holds) leave(one uint64) (last, quiet bool) {
	word := h.word.Add(-one)
	last = word&withdrawn != 0 && word&heldMask == 0
	quiet = one == oneBusy && word&revoked != 0 && word&busyMask == 0
	return last, quiet
}

// set marks the entry and says whether it was marked so before and who held it then.
func (h *holds) set(marks uint64) (before uint64) { return h.word.Or(marks) }
