// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// seated is a connection that knows its path.
type seated struct {
	transport.Conn
	number int
	local  bool
	bound  int
}

func (s *seated) LocalPath() (int, bool) { return s.number, s.local }
func (s *seated) Bound(bytes int)        { s.bound = bytes }

// allCores is how many cores this process may use, or skips: seats are kept only where these are all.
func allCores(t *testing.T, least int) int {
	var home unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(0, &home))
	cores := home.Count()
	for core := range cores {
		if !home.IsSet(core) {
			t.Skip("this process is bound to some of the cores")
		}
	}
	if cores < least {
		t.Skip("too few cores")
	}
	return cores
}

func TestBothEndsComeToTheSameCoreInWhateverOrder(t *testing.T) {
	cores := allCores(t, 2)
	conns := make([]transport.Conn, 0, cores)
	for i := range cores {
		conns = append(conns, &seated{number: 70000 + 7*i, local: true})
	}
	mine := seatsFor(conns, cores)
	used := map[unix.CPUSet]bool{}
	for i, conn := range conns {
		require.True(t, mine[i].kept)
		require.Equal(t, aheadBytes, conn.(*seated).bound)
		used[mine[i].core] = true
	}
	require.Len(t, used, cores, "each connection has a core of its own")
	for i := range conns {
		turned := append(append([]transport.Conn{}, conns[i:]...), conns[:i]...)
		theirs := seatsFor(turned, cores)
		for j := range turned {
			require.Equal(t, mine[(i+j)%cores], theirs[j])
		}
	}
}

func TestNoSeatIsKeptWithCoresToSpareOrAcrossHosts(t *testing.T) {
	near := func() transport.Conn { return &seated{number: 1, local: true} }
	for _, c := range []struct {
		conns []transport.Conn
		cores int
	}{
		{[]transport.Conn{near()}, 2},
		{[]transport.Conn{near(), near()}, 4},
		{[]transport.Conn{near(), &seated{number: 2}}, 1},
		{[]transport.Conn{near(), &struct{ transport.Conn }{}}, 1},
	} {
		for _, s := range seatsFor(c.conns, c.cores) {
			require.False(t, s.kept)
		}
	}
}
