// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"runtime"

	"golang.org/x/sys/unix"

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
}

// seatsFor returns the seat of each connection. Both ends come to the same cores by themselves, which they can only where they may use
// all of them.
func seatsFor(conns []transport.Conn) []seat {
	seats := make([]seat, len(conns))
	first, ok := conns[0].(localConn)
	if !ok {
		return seats
	}
	number, local := first.LocalPath()
	cores := runtime.NumCPU()
	var home unix.CPUSet
	if !local || cores >= 2*len(conns) || unix.SchedGetaffinity(0, &home) != nil {
		return seats
	}
	for core := range cores {
		if !home.IsSet(core) {
			return seats
		}
	}
	for i := range seats {
		seats[i].kept, seats[i].home = true, home
		seats[i].core.Set((number + i) % cores)
	}
	return seats
}

// take binds the calling goroutine to the seat's core. A system that does not allow it costs only speed.
func (s *seat) take() {
	if s.kept {
		runtime.LockOSThread()
		_ = unix.SchedSetaffinity(0, &s.core)
	}
}

// leave undoes take.
func (s *seat) leave() {
	if s.kept {
		_ = unix.SchedSetaffinity(0, &s.home)
		runtime.UnlockOSThread()
	}
}
