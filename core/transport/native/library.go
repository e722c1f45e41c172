// SPDX-License-Identifier: Apache-2.0

// Package native has a vendor's library move the bytes of a link: a direct transport whose reads are the library's.
package native

import (
	"net/netip"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

// Library is one object of the vendor's library, with a listener of its own for the objects of peers. Its methods may be called from many
// goroutines and block as the library does; none of them can be cancelled. Errors are *status.Error: the library's own status where it is a
// documented one, else Failed with the number in the text.
type Library interface {
	// Name is what peers' objects call this one.
	Name() uint64
	// Port is where the listener for peers' objects is.
	Port() uint16
	// Register makes memory known to the library and returns its id there, above 0 and never used again: so many rows, or blocks, of
	// shape.Stride bytes in each tensor.
	Register(shape plan.Shape, onDevice bool, addrs []uintptr) (int64, error)
	// Unregister takes that back. An unknown id is fine.
	Unregister(id int64) error
	// Link makes the library's own link to the object of a peer, which listens at remote, from the address local, within timeout.
	Link(peer uint64, local netip.Addr, remote netip.AddrPort, timeout time.Duration) error
	// Unlink drops this end of the link to a peer's object, and asks nobody. It waits for the transfer that is under way. No link is fine.
	Unlink(peer uint64) error
	// Pull copies what transfer says from a peer's memory, and returns when it has or has failed. It looks at nothing of the peer that was
	// registered after the first transfer over the link: such memory is CacheNotExist.
	Pull(transfer *Transfer) error
	// Close ends the object. It waits for the calls that are under way, however long they take.
	Close() error
}

// Transfer is one pull of the library's: a row to a row or, with block lists, blocks to blocks.
type Transfer struct {
	Peer                 uint64
	Remote, Local        int64      // ids of the library's
	RemoteRow, LocalRow  uint64     // without block lists
	Bytes                uint64     // of a row, without block lists
	SrcTensors           plan.Range // of equal lengths, inside the caches
	DstTensors           plan.Range
	SrcBlocks, DstBlocks []uint64 // of equal lengths
}
