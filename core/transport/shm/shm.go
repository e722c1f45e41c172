// SPDX-License-Identifier: Apache-2.0

// Package shm moves bytes between engines that share a host: a direct transport.
//
// A [Share] is what an engine gives to such peers: its directory and its pools, as read-only descriptors, and a canary. A [Session] maps
// what the peer has given. A pull from pool memory is a copy in user space, of which the owner knows nothing; private memory, which
// callers have registered, is read with process_vm_readv where a real probe shows that this is allowed. What can be reached in neither
// way is streamed over the link's data connections.
//
// It promises that nothing of the peer's is trusted before it was checked, that no mapping of the peer's can shrink under a copy, that
// a process which took the number of a dead peer is not read for it, and that a peer's memory is unmapped as soon as the link is dead
// and its copies have let go. It never writes into the peer's memory, which is mapped for reading alone.
package shm

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// offer is what a gift says of its descriptors, which are the directory's and then one for each pool.
type offer struct {
	Directory uint64   `cbor:"1,keyasint"` // bytes
	Pools     []uint64 `cbor:"2,keyasint,omitempty"`
	CanaryAt  uint64   `cbor:"3,keyasint"`
	Canary    []byte   `cbor:"4,keyasint"`
}

// maxPools bounds what a peer may have us map: an engine has one pool for each placement.
const maxPools = 4

func readOffer(b []byte) (offer, error) {
	var o offer
	if len(b) == 0 {
		return o, errors.New("the peer offers no memory")
	}
	if err := transport.ReadTerms(b, &o); err != nil {
		return o, fmt.Errorf("read what the peer offers: %w", err)
	}
	if len(o.Pools) > maxPools || len(o.Canary) != len(mem.Process{}.Canary) {
		return o, errors.New("the peer's offer makes no sense")
	}
	return o, nil
}

// Share is an engine's memory as its peers may read it. Its methods may be called from many goroutines; Close comes last.
type Share struct {
	publisher *directory.Publisher
	pools     []*mem.HostMemory
	canary    *mem.Canary
	crew      *mem.Crew
}

// NewShare makes the directory of an engine and says what else is shared. pools stay the caller's. threads is how many threads one pull
// of this engine's may use.
func NewShare(incarnation [16]byte, pools []*mem.HostMemory, threads int) (*Share, error) {
	publisher, err := directory.NewPublisher(incarnation)
	if err != nil {
		return nil, err
	}
	canary, err := mem.NewCanary()
	if err != nil {
		return nil, errors.Join(err, publisher.Close())
	}
	return &Share{publisher: publisher, pools: pools, canary: canary, crew: mem.NewCrew(threads)}, nil
}

// Publisher returns the directory, for the table of caches to fill.
func (s *Share) Publisher() *directory.Publisher { return s.publisher }

// Gift returns what a peer needs: a text for NewSession and fresh descriptors, which the caller closes.
func (s *Share) Gift() (text []byte, fds []int, err error) {
	canary := s.canary.Value()
	o := offer{Directory: s.publisher.Bytes(), CanaryAt: uint64(s.canary.Addr()), Canary: canary[:]}
	shared := []int{s.publisher.FD()}
	for _, pool := range s.pools {
		o.Pools = append(o.Pools, pool.Bytes())
		shared = append(shared, pool.FD())
	}
	for _, fd := range shared {
		opened, err := mem.ReadOnly(fd)
		if err != nil {
			closeAll(fds)
			return nil, nil, err
		}
		fds = append(fds, opened)
	}
	if text, err = cbor.Marshal(o); err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return text, fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // a descriptor for reading, nothing can be lost
	}
}

// Close takes everything back. Sessions have been closed before.
func (s *Share) Close() error {
	s.crew.Close()
	return errors.Join(s.publisher.Close(), s.canary.Close())
}
