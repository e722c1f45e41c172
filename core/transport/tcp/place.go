// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Where a link stays on its host and there are fewer cores than goroutines that drive its connections, each connection keeps to one
// core at both ends while it is active: the receiver then finds in that core's cache what the sender has just put there. Left to the
// scheduler, pairs come to lie crosswise for long stretches, which costs up to half of the throughput (2 cores, 2 connections). With
// cores to spare nothing is kept: sender and receiver do better side by side.
type seat struct {
	kept       bool
	core, home unix.CPUSet
}

// localConn is a connection that may know that both its ends are on this host.
type localConn interface {
	// LocalPath returns a number that both ends know alike, and whether both are on this host.
	LocalPath() (number int, ok bool)
	// Bound limits what is sent ahead of the receiver, in bytes.
	Bound(bytes int)
}

// aheadBytes is what a sender puts into a core's cache before its receiver takes it out, about: the kernel counts its own overhead too,
// and what the receiver is let in for comes on top. A level-2 cache of 1 to 2 MiB holds it.
const aheadBytes = 1 << 20

// frameFor is how large frames may be. Each one costs its receiver some small calls at its end, and, where connections keep to a core,
// changes of threads: with four times the bytes a frame that was 4% of W1 on loopback.
func frameFor(conns []transport.Conn) uint64 {
	for _, conn := range conns {
		c, ok := conn.(localConn)
		if !ok {
			return farFrame
		}
		if _, local := c.LocalPath(); !local {
			return farFrame
		}
	}
	return maxFrame
}

// seatsFor returns the seat of each connection. Both ends come to the same cores by themselves, whatever order they have the connections
// in; they can only where they may use all cores.
func seatsFor(conns []transport.Conn, cores int) []seat {
	seats := make([]seat, len(conns))
	var home unix.CPUSet
	if cores >= 2*len(conns) || unix.SchedGetaffinity(0, &home) != nil {
		return seats
	}
	for core := range cores {
		if !home.IsSet(core) {
			return seats
		}
	}
	numbers, sum := make([]int, len(conns)), 0
	for i, conn := range conns {
		c, ok := conn.(localConn)
		if !ok {
			return seats
		}
		number, local := c.LocalPath()
		if !local {
			return seats
		}
		numbers[i], sum = number, sum+number
	}
	sorted := slices.Sorted(slices.Values(numbers))
	for i, conn := range conns {
		conn.(localConn).Bound(aheadBytes)
		rank, _ := slices.BinarySearch(sorted, numbers[i])
		seats[i].kept, seats[i].home = true, home
		seats[i].core.Set((sum + rank) % cores)
	}
	return seats
}

// take begins a goroutine's stint, on the seat's core where it is kept. Leave ends it.
func (s *seat) take(stint *mem.Stint) {
	stint.Begin()
	if s.kept {
		stint.Keep(&s.core, &s.home)
	}
}
