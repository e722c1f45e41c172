// SPDX-License-Identifier: Apache-2.0

package link_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// Faults by seed over the in-memory network, under virtual time. A bubble ends only when every goroutine has, and the network counts
// the connections that nobody closed.

const (
	peerDead = 4 * time.Second
	seeds    = 100 // of each test; 6000 were tried when it was written
)

// host is a link.Network without a proof of a shared host.
type host struct{ *fabric.Host }

func (host) Prover() link.Prover { return nil }

// proving is a link.Network whose hosts share a machine.
type proving struct{ *fabric.Host }

func (p proving) Prover() link.Prover { return prover(p) }

// prover shows the proof of the fabric as the link knows one. The types differ by name alone.
type prover struct{ *fabric.Host }

func (p prover) Open(token link.Token, fds link.Descriptors, gift func() (link.Gift, error)) (link.Door, error) {
	d, err := p.OpenDoor(token, fabric.Descriptors(fds), fabricGift(gift))
	if err != nil {
		return nil, err
	}
	return door{d}, nil
}

func (p prover) Reach(ctx context.Context, token link.Token, nonce link.Nonce, fds link.Descriptors,
	gift func() (link.Gift, error)) (link.Witness, error) {
	w, err := p.ReachDoor(ctx, token, nonce, fabric.Descriptors(fds), fabricGift(gift))
	if err != nil {
		return nil, err
	}
	return witness{w}, nil
}

func fabricGift(gift func() (link.Gift, error)) func() (fabric.Gift, error) {
	if gift == nil {
		return nil
	}
	return func() (fabric.Gift, error) {
		g, err := gift()
		return fabric.Gift(g), err
	}
}

type door struct{ *fabric.Door }

func (d door) Expect(nonce link.Nonce) func() (link.Witness, error) {
	claim := d.Door.Expect(nonce)
	return func() (link.Witness, error) {
		w, err := claim()
		if err != nil {
			return nil, err
		}
		return witness{w}, nil
	}
}

type witness struct{ *fabric.Witness }

func (w witness) Take() link.Gift { return link.Gift(w.Witness.Take()) }

// closeOnly is a session that does nothing but to own its connections.
type closeOnly struct {
	conns []transport.Conn
	once  sync.Once
}

func (s *closeOnly) Pull(context.Context, *transport.Request, transport.Local) error { return nil }

func (s *closeOnly) Push(context.Context, *transport.Push) error { return nil }

func (s *closeOnly) Idle() <-chan struct{} {
	idle := make(chan struct{})
	close(idle)
	return idle
}

func (s *closeOnly) Close(error) {
	twice := true
	s.once.Do(func() { twice = false })
	if twice {
		panic("a session was closed twice")
	}
	for _, c := range s.conns {
		c.Shutdown()
		_ = c.Close()
	}
}

func manager(t *testing.T, h *fabric.Host, id uint64, change ...func(*link.Config)) (*link.Manager, string) {
	cfg := link.Config{
		Network: host{h}, ClusterID: id, Offers: []string{"tcp"}, DataConnections: 2, PeerDead: peerDead,
		Attach: func(_ link.Peer, conns []transport.Conn) (link.Attached, error) {
			return link.Attached{Session: &closeOnly{conns: conns}}, nil
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	m, err := link.NewManager(cfg)
	require.NoError(t, err)
	address, err := m.Listen(net.JoinHostPort(h.IP(), "0"))
	require.NoError(t, err)
	return m, address
}

func dial(m *link.Manager, address string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err := m.Dial(ctx, link.DialRequest{Address: address})
	return err
}

func TestBothDialAtOnceUnderDelaysGetOneLink(t *testing.T) {
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			network := fabric.New(seed)
			network.SetFaults(fabric.Faults{Latency: time.Millisecond, Jitter: 50 * time.Millisecond, Loss: 0.05})
			a, atA := manager(t, network.Host("a"), 1)
			b, atB := manager(t, network.Host("b"), 2)
			random := rand.New(rand.NewPCG(seed, 0))
			head, late := time.Duration(random.IntN(300))*time.Millisecond, random.IntN(2) == 0
			if seed%3 == 0 {
				head = 0
			}
			var fromA, fromB error
			var dials sync.WaitGroup
			dials.Go(func() {
				if late {
					time.Sleep(head) // virtual time: b has a head start
				}
				fromA = dial(a, atB, time.Minute)
			})
			dials.Go(func() {
				if !late {
					time.Sleep(head) // virtual time: a has a head start
				}
				fromB = dial(b, atA, time.Minute)
			})
			dials.Wait()
			for _, err := range []error{fromA, fromB} {
				require.True(t, err == nil || (head > 0 && errors.Is(err, status.AlreadyLink)), "seed %d: %v", seed, err)
			}
			la, err := a.Link(2)
			require.NoError(t, err, "seed %d", seed)
			lb, err := b.Link(1)
			require.NoError(t, err, "seed %d", seed)
			time.Sleep(10 * peerDead) // virtual time: pings keep it alive
			require.NoError(t, la.Cause(), "seed %d", seed)
			require.NoError(t, lb.Cause(), "seed %d", seed)
			require.Equal(t, 6, network.Stats().Open, "seed %d: control and two data connections, both ends", seed)
			require.NoError(t, a.Close())
			<-lb.Dead()
			require.NoError(t, b.Close())
			require.Zero(t, network.Stats().Open)
		})
	}
}

func TestLinksRecoverFromCutsAtAnyByte(t *testing.T) {
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			network := fabric.New(seed)
			faults := fabric.Faults{Latency: time.Millisecond, Jitter: 20 * time.Millisecond, Tear: 7}
			broken := faults
			broken.CutWithin, broken.Refuse = 600, 0.1
			network.SetFaults(broken)
			a, atA := manager(t, network.Host("a"), 1)
			b, atB := manager(t, network.Host("b"), 2)
			var calls sync.WaitGroup
			for i, way := range []struct {
				m       *link.Manager
				peer    uint64
				address string
			}{{a, 2, atB}, {b, 1, atA}} {
				for j := range 2 {
					random := rand.New(rand.NewPCG(seed, uint64(2*i+j)))
					calls.Go(func() {
						for range 10 {
							_ = dial(way.m, way.address, 2*time.Second)
							time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond) // virtual time: the calls of the others fall anywhere between
							if random.IntN(3) == 0 {
								ctx, cancel := context.WithTimeout(context.Background(), time.Second)
								_ = way.m.Unlink(ctx, way.peer, way.address, random.IntN(2) == 0)
								cancel()
							}
						}
					})
				}
			}
			calls.Wait()
			network.SetFaults(faults)
			network.CutAll()
			time.Sleep(time.Minute) // virtual time: what was under way has ended by then
			require.NoError(t, dial(a, atB, 10*time.Second), "seed %d", seed)
			_, err := b.Link(1)
			require.NoError(t, err)
			require.Equal(t, 6, network.Stats().Open, "seed %d", seed)
			require.NoError(t, errors.Join(a.Close(), b.Close()))
			require.Zero(t, network.Stats().Open)
		})
	}
}

func TestCloseAtAnyMomentOfADial(t *testing.T) {
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			network := fabric.New(seed)
			network.SetFaults(fabric.Faults{Latency: 10 * time.Millisecond, Jitter: 10 * time.Millisecond})
			a, atA := manager(t, network.Host("a"), 1)
			b, atB := manager(t, network.Host("b"), 2)
			random := rand.New(rand.NewPCG(seed, 0))
			var calls sync.WaitGroup
			calls.Go(func() { _ = dial(a, atB, time.Minute) })
			calls.Go(func() { _ = dial(b, atA, time.Minute) })
			time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond) // virtual time: any moment of the dials
			began := time.Now()
			require.NoError(t, a.Close())
			require.LessOrEqual(t, time.Since(began), 2*time.Second)
			calls.Wait()
			time.Sleep(time.Minute) // virtual time: b has noticed by then
			require.Zero(t, b.LiveLinks(), "seed %d", seed)
			require.NoError(t, b.Close())
			require.Zero(t, network.Stats().Open, "seed %d", seed)
		})
	}
}

func TestSilenceAcrossHostsIsDeathWithinABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := fabric.New(1)
		ha, hb := network.Host("a"), network.Host("b")
		a, _ := manager(t, ha, 1)
		b, atB := manager(t, hb, 2)
		require.NoError(t, dial(a, atB, time.Second))
		la, err := a.Link(2)
		require.NoError(t, err)
		lb, err := b.Link(1)
		require.NoError(t, err)
		time.Sleep(time.Hour) // virtual time: pings keep it alive
		require.NoError(t, la.Cause())
		network.Partition(ha, hb)
		cut := time.Now()
		<-la.Dead()
		<-lb.Dead()
		require.GreaterOrEqual(t, time.Since(cut), peerDead*3/4)
		require.LessOrEqual(t, time.Since(cut), peerDead*3/2)
		require.ErrorContains(t, la.Cause(), "silent for 4s")
		require.ErrorIs(t, dial(a, atB, time.Second), status.Timeout)
		network.Heal(ha, hb)
		require.NoError(t, dial(a, atB, time.Second))
		require.NoError(t, errors.Join(a.Close(), b.Close()))
	})
}

func TestHalfOpenLinkDoesNotBlockItsSuccessor(t *testing.T) {
	for _, first := range []string{"a", "b"} { // whichever of them decides
		synctest.Test(t, func(t *testing.T) {
			network := fabric.New(1)
			ha, hb := network.Host("a"), network.Host("b")
			a, atA := manager(t, ha, 1)
			b, atB := manager(t, hb, 2)
			require.NoError(t, dial(a, atB, time.Second))
			// b doesn't hear that a has dropped the link.
			network.Partition(ha, hb)
			require.NoError(t, a.Unlink(context.Background(), 2, "", true))
			require.Equal(t, 1, b.LiveLinks())
			network.SetFaults(fabric.Faults{}) // and what a sent of it never comes in time: the new dial is faster
			network.Heal(ha, hb)
			if first == "a" {
				require.NoError(t, dial(a, atB, time.Second))
			} else if err := dial(b, atA, time.Second); err != nil {
				require.ErrorIs(t, err, status.AlreadyLink)
			}
			synctest.Wait()
			require.Equal(t, a.LiveLinks(), b.LiveLinks())
			require.NoError(t, errors.Join(a.Close(), b.Close()))
			require.Zero(t, network.Stats().Open)
		})
	}
}

func TestSilentStrangerIsClosedAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := fabric.New(1)
		a, atA := manager(t, network.Host("a"), 1)
		stranger, err := network.Host("b").Dial(context.Background(), "", atA)
		require.NoError(t, err)
		_, err = stranger.Write([]byte("LLMD")) // the first half of the magic
		require.NoError(t, err)
		began := time.Now()
		_, err = stranger.Read(make([]byte, 1))
		require.Error(t, err)
		require.Equal(t, 5*time.Second, time.Since(began))
		require.NoError(t, stranger.Close())
		require.NoError(t, a.Close())
		require.Zero(t, network.Stats().Open)
	})
}

func TestProofOfASharedHostOverTheFabric(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := fabric.New(1)
		network.SetFaults(fabric.Faults{Latency: 10 * time.Millisecond})
		got := make(chan string, 2)
		prove := func(h *fabric.Host) func(*link.Config) {
			return func(c *link.Config) {
				c.Network = proving{h}
				c.Gift = func() (link.Gift, error) { return link.Gift{Bytes: []byte("of " + h.Name())}, nil }
				c.Attach = func(p link.Peer, conns []transport.Conn) (link.Attached, error) {
					got <- string(p.Witness.Take().Bytes)
					return link.Attached{Session: &closeOnly{conns: conns}}, nil
				}
			}
		}
		ha, hb := network.Host("a"), network.Host("b")
		a, _ := manager(t, ha, 1, prove(ha))
		b, atB := manager(t, hb, 2, prove(hb))
		require.NoError(t, dial(a, atB, time.Second))
		require.Equal(t, "of a", <-got)
		require.Equal(t, "of b", <-got)
		la, err := a.Link(2)
		require.NoError(t, err)
		require.True(t, la.Peer().SameHost)

		// On one host silence is not death.
		hb.Pause()
		time.Sleep(10 * peerDead) // virtual time: far beyond what a peer on another host may be silent
		require.NoError(t, la.Cause())
		hb.Resume()
		hb.Kill()
		<-la.Dead()
		require.NoError(t, a.Close())
		_ = b.Close() // its listener has died with its host
		require.Zero(t, network.Stats().Open)
		require.Zero(t, network.Stats().Proofs)
	})
}
