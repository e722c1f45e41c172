// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"io"
	"net"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// near is an engine's part of a link whose data connections stay within the host.
func near(offers ...string) func(*Config) {
	return func(cfg *Config) { cfg.Offers, cfg.Near = offers, "shm" }
}

// waysOf says over which network each data connection of both ends runs.
func waysOf(a, b *node) (ways []string) {
	for _, n := range [][2]*node{{a, b}, {b, a}} {
		for _, c := range n[0].mustLink(n[1].cfg.ClusterID).Session().(*fakeSession).conns {
			ways = append(ways, c.(*testConn).LocalAddr().Network())
		}
	}
	return ways
}

func TestDataConnectionsStayWithinTheHostWhereTheTransportDoes(t *testing.T) {
	within, beyond := []string{"unix", "unix", "unix", "unix"}, []string{"tcp", "tcp", "tcp", "tcp"}
	for name, c := range map[string]struct {
		dialer, acceptor func(*Config)
		ways             []string
	}{
		"both can":          {near("shm", "tcp"), near("shm", "tcp"), within},
		"another is better": {near("cann", "shm", "tcp"), near("cann", "shm", "tcp"), beyond},
		"one does without":  {near("shm", "tcp"), near("tcp"), beyond},
		"another is required": {near("shm", "tcp"), func(cfg *Config) {
			near("shm", "tcp")(cfg)
			cfg.Required = "tcp"
		}, beyond},
		"nothing is offered": {near(), near(), beyond},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			a, b := newNode(t, 1, c.dialer), newNode(t, 2, c.acceptor)
			a.mustDial(b)
			requireJoined(t, a, b)
			require.Equal(t, c.ways, waysOf(a, b))
			if c.ways[0] == "unix" {
				require.Regexp(t, `data connection 1: @[0-9a-f]{5} -> @llm-datadist-data-[0-9a-f]{32}`, a.Explain(2))
				require.Regexp(t, `data connection 1: @llm-datadist-data-[0-9a-f]{32} -> @[0-9a-f]{5}`, b.Explain(1))
			}
			require.False(t, a.saw("data connections leave"))
			require.NoError(t, a.unlink(2, b.address, false))
			b.mustDial(a)
			requireJoined(t, a, b)
		})
	}
}

func TestDataConnectionsLeaveTheHostsSocketsWhereTheyHaveTo(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"nobody listens there": func(cfg *Config) { cfg.Offers = []string{"shm", "tcp"} },
		"the shared host is not shown": func(cfg *Config) {
			near("shm", "tcp")(cfg)
			cfg.Network.(*testNet).prover = nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			a, b := newNode(t, 1, near("shm", "tcp")), newNode(t, 2, change)
			a.mustDial(b)
			requireJoined(t, a, b)
			require.Equal(t, []string{"tcp", "tcp", "tcp", "tcp"}, waysOf(a, b))
			require.Equal(t, name == "nobody listens there", a.saw("data connections leave the host's own sockets"))
		})
	}
}

func TestLinkFailsWhoseDataConnectionIsCutShort(t *testing.T) {
	check(t)
	a, b := newNode(t, 1, near("shm", "tcp")), newNode(t, 2, near("shm", "tcp"))
	a.nearby = deafNearby{UnixProver{}}
	_, err := a.dialTo(b.address)
	require.ErrorContains(t, err, "data connection: ")
	require.Zero(t, a.LiveLinks()+b.LiveLinks())
	a.nearby = UnixProver{}
	a.mustDial(b)
	requireJoined(t, a, b)
}

// deafNearby connects to somebody who closes at once.
type deafNearby struct{ UnixProver }

func (deafNearby) DialData(context.Context, Token) (net.Conn, error) {
	ours, theirs := net.Pipe()
	_ = theirs.Close()
	return ours, nil
}

func TestOnlyDataConnectionsComeInNearby(t *testing.T) {
	check(t)
	n := newNode(t, 1, near("shm", "tcp"))
	hears := func(send []byte) []byte {
		c, err := (UnixProver{}).DialData(context.Background(), n.token)
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(patient)))
		_, err = c.Write(send)
		require.NoError(t, err)
		answer, err := io.ReadAll(c)
		require.NoError(t, err)
		require.NoError(t, c.Close())
		return answer
	}
	h := hello{Incarnation: make([]byte, 16), ClusterID: 2, Nonce: make([]byte, 16)}
	h.Incarnation[0] = 1
	require.Empty(t, hears(appendBlock(ourPreamble(intentControl).append(nil), h)))
	require.True(t, n.saw("intent 1 where only data connections come in"))
	require.Contains(t, string(hears(appendBlock(ourPreamble(intentData).append(nil), h))), "data connection of no link")
}

func TestAnotherUserHasNoDataConnectionNearby(t *testing.T) {
	needRoot(t)
	stranger := func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	}
	t.Run("who dials", func(t *testing.T) {
		check(t)
		token := tokenOf("data inside")
		l, err := (UnixProver{}).ListenData(token)
		require.NoError(t, err)
		accepted := make(chan error, 1)
		go func() {
			_, err := l.Accept()
			accepted <- err
		}()
		require.Contains(t, spawn(t, "dial data:data inside", stranger).address, "runs under uid 0, this process under 12345")
		require.NoError(t, l.Close())
		require.ErrorIs(t, <-accepted, net.ErrClosed, "nobody else was let in")
	})
	t.Run("who listens", func(t *testing.T) {
		check(t)
		require.Equal(t, "open", spawn(t, "listen data:data outside", stranger).address)
		_, err := (UnixProver{}).DialData(context.Background(), tokenOf("data outside"))
		require.ErrorContains(t, err, "runs under uid 12345, this process under 0")
	})
}
