// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

func TestDialMakesOneLinkThatWorksBothWays(t *testing.T) {
	for _, lower := range []string{"dialer", "acceptor"} {
		t.Run("decided by the "+lower, func(t *testing.T) {
			check(t)
			a, b := newNode(t, 1), newNode(t, 2)
			decidedBy(a, b)
			if lower == "acceptor" {
				decidedBy(b, a)
			}
			a.mustDial(b)
			requireJoined(t, a, b)
			require.True(t, a.mustLink(2).Peer().SameHost, a.mustLink(2).Peer().SameHostReason)
			require.True(t, b.mustLink(1).Peer().SameHost, b.mustLink(1).Peer().SameHostReason)
			explained := a.Explain(2)
			require.Contains(t, explained, "linked, dialed at "+b.address)
			require.Contains(t, explained, "transport: tcp")
			require.Contains(t, explained, "same host: shown")
			require.Contains(t, explained, "data connection 1: 127.0.0.1:")
			require.Empty(t, a.Explain(99))

			_, err := a.dialTo(b.address)
			require.ErrorIs(t, err, status.AlreadyLink)
			_, err = b.dialTo(a.address)
			require.ErrorIs(t, err, status.AlreadyLink)
			requireJoined(t, a, b)
		})
	}
}

func TestLinkOverIPv6(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	require.NoError(t, b.StopListening())
	bound, err := b.Listen("[::1]:0")
	if err != nil {
		t.Skip(err)
	}
	_, err = a.Dial(context.Background(), DialRequest{Address: bound, Source: "::1"})
	require.NoError(t, err)
	requireJoined(t, a, b)
}

func TestBothDialAtOnceGetOneLink(t *testing.T) {
	check(t)
	for range 200 {
		a, b := newNode(t, 1), newNode(t, 2)
		var dials sync.WaitGroup
		errs := make([]error, 2)
		start := make(chan struct{})
		for i, way := range [][2]*node{{a, b}, {b, a}} {
			spin := rand.IntN(2000)
			dials.Go(func() {
				<-start
				for range spin { // in random order, and at times one well before the other
					_ = rand.Int()
				}
				_, errs[i] = way[0].dialTo(way[1].address)
			})
		}
		close(start)
		dials.Wait()
		for _, err := range errs {
			if !errors.Is(err, status.AlreadyLink) {
				require.NoError(t, err)
			}
		}
		require.False(t, errs[0] != nil && errs[1] != nil, "one of them made the link")
		requireJoined(t, a, b)
		a.stop()
		b.stop()
	}
}

// gate lets control connections through and holds the data connections that come after them until they are given up.
type gate struct {
	TCP
	seen chan struct{} // a data connection is held
	once sync.Once
	mu   sync.Mutex
	n    int
}

func (g *gate) dial(ctx context.Context, source, address string) (net.Conn, error) {
	g.mu.Lock()
	g.n++
	first := g.n == 1
	g.mu.Unlock()
	if first {
		return g.TCP.Dial(ctx, source, address)
	}
	g.once.Do(func() { close(g.seen) })
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestParkedDialTakesOverWhenTheOtherDirectionIsBlocked(t *testing.T) {
	for _, lower := range []string{"blocked", "open"} {
		t.Run(lower+" end decides", func(t *testing.T) {
			check(t)
			blocked, open := newNode(t, 1), newNode(t, 2)
			decidedBy(blocked, open)
			if lower == "open" {
				decidedBy(open, blocked)
			}
			g := &gate{seen: make(chan struct{})}
			blocked.net.dial = g.dial
			ctx, giveUp := context.WithCancel(context.Background())
			var dials sync.WaitGroup
			var blockedErr, openErr error
			dials.Go(func() { _, blockedErr = blocked.Dial(ctx, DialRequest{Address: open.address}) })
			<-g.seen // its control connection was chosen
			parked := make(chan struct{})
			open.net.dial = func(ctx context.Context, source, address string) (net.Conn, error) {
				defer func() {
					select {
					case <-parked:
					default:
						close(parked)
					}
				}()
				return open.net.TCP.Dial(ctx, source, address)
			}
			open.net.dial = onlyOnceSignalled(open.net.dial)
			dials.Go(func() { _, openErr = open.dialTo(blocked.address) })
			<-parked
			giveUp()
			dials.Wait()
			require.ErrorIs(t, blockedErr, status.Failed)
			require.NoError(t, openErr)
			requireJoined(t, open, blocked)
		})
	}
}

// onlyOnceSignalled serialises dials: the hook above is not made for many at once.
func onlyOnceSignalled(dial func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	var mu sync.Mutex
	return func(ctx context.Context, source, address string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		return dial(ctx, source, address)
	}
}

func TestForceUnlinkAndRedialAtOnce(t *testing.T) {
	for _, c := range []struct{ name, low, unlinks, dials string }{
		{"decider unlinks and dials", "a", "a", "a"},
		{"decider unlinks, other dials", "a", "a", "b"},
		{"other unlinks and dials", "a", "b", "b"},
		{"other unlinks, decider dials", "a", "b", "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			check(t)
			nodes := map[string]*node{"a": newNode(t, 1), "b": newNode(t, 2)}
			a, b := nodes["a"], nodes["b"]
			decidedBy(a, b)
			a.mustDial(b)
			for range 20 {
				unlinks, dials := nodes[c.unlinks], nodes[c.dials]
				peer := b
				if unlinks == b {
					peer = a
				}
				old := unlinks.mustLink(peer.cfg.ClusterID)
				require.NoError(t, unlinks.unlink(peer.cfg.ClusterID, "", true))
				select {
				case cause := <-old.Session().(*fakeSession).closed:
					require.ErrorIs(t, cause, status.Failed)
					require.ErrorContains(t, cause, "unlinked")
				default:
					require.Fail(t, "session is open after the unlink")
				}
				target := b
				if dials == b {
					target = a
				}
				_, err := dials.dialTo(target.address)
				require.NoError(t, err)
				requireJoined(t, a, b)
			}
		})
	}
}

func TestRestartedPeerReplacesItsOldLink(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	old := a.mustLink(2)
	// The old incarnation is not gone: its end of the link still looks well.
	again := newNode(t, 2)
	again.mustDial(a)
	requireDead(t, old, patient)
	require.ErrorContains(t, old.Cause(), "replaced")
	requireJoined(t, again, a)
	require.NotEqual(t, old.Peer().Incarnation, a.mustLink(2).Peer().Incarnation)
}

func TestPeerThatWasClosedIsDeadAndIsReplacedAtOnce(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	old := a.mustLink(2)
	b.stop()
	requireDead(t, old, patient)
	require.ErrorContains(t, old.Cause(), "peer died")
	require.ErrorIs(t, old.Cause(), status.Failed)
	require.Zero(t, a.LiveLinks())
	_, err := a.Link(2)
	require.ErrorIs(t, err, status.NotYetLink)
	require.ErrorContains(t, err, "peer died")
	again := newNode(t, 2)
	a.mustDial(again)
	requireJoined(t, a, again)
}

func TestBrokenDataConnectionEndsTheLinkOnBothEnds(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	la, lb := a.mustLink(2), b.mustLink(1)
	la.Fail(errors.New("a data connection broke"))
	require.False(t, la.lives(), "at once")
	requireDead(t, lb, patient)
	require.ErrorContains(t, la.Cause(), "a data connection broke")
	a.mustDial(b)
	requireJoined(t, a, b)
}

func TestLinkIsKnownByTheReportedID(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	id, err := a.Dial(context.Background(), DialRequest{Address: b.address, GivenID: 7, HasGivenID: true})
	require.NoError(t, err)
	require.Equal(t, uint64(2), id)
	require.True(t, a.saw("reports cluster id 2, not 7"))
	_, err = a.Link(7)
	require.ErrorIs(t, err, status.NotYetLink)
	require.ErrorContains(t, err, "never linked")
	requireJoined(t, a, b)
	// The id that was given has no link: nothing is dropped under it.
	require.NoError(t, a.unlink(7, b.address, false))
	requireJoined(t, a, b)
}

func TestLiveLinkToTheGivenIDNeedsNoNetwork(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	_, err := a.Dial(context.Background(), DialRequest{Address: "nowhere", GivenID: 2, HasGivenID: true})
	require.ErrorIs(t, err, status.AlreadyLink)
}

func TestAccessModesMustAgree(t *testing.T) {
	check(t)
	a, b := newNode(t, 1, func(c *Config) { c.OneSided = true }), newNode(t, 2)
	for _, way := range [][2]*node{{a, b}, {b, a}} {
		id := way[1].cfg.ClusterID
		_, err := way[0].Dial(context.Background(), DialRequest{Address: way[1].address, GivenID: id, HasGivenID: true})
		require.ErrorIs(t, err, status.ParamInvalid)
		require.Eventually(t, func() bool { return way[1].saw("access modes differ") }, patient, time.Millisecond)
		require.Contains(t, way[0].Explain(id), "access modes differ")
	}
}

func TestTransportsMustAgree(t *testing.T) {
	check(t)
	shm := newNode(t, 1, func(c *Config) { c.Offers, c.Required = []string{"shm", "tcp"}, "shm" })
	tcp := newNode(t, 2)
	both := newNode(t, 3, func(c *Config) { c.Offers = []string{"shm", "tcp"} })
	other := newNode(t, 4, func(c *Config) { c.Offers = []string{"ucx"} })
	for _, way := range [][2]*node{{shm, tcp}, {tcp, shm}, {tcp, other}} {
		_, err := way[0].dialTo(way[1].address)
		require.ErrorIs(t, err, status.LinkFailed)
		require.ErrorContains(t, err, "transport")
	}
	both.mustDial(shm)
	require.Equal(t, []string{"shm"}, both.mustLink(1).Peer().Transports)
	require.Equal(t, []string{"shm"}, shm.mustLink(3).Peer().Transports)
	require.Contains(t, both.Explain(1), "not taken: tcp: shm is required")
	both.mustDial(tcp)
	require.Contains(t, both.Explain(2), "not taken: shm: only one end offers it")
}

func TestLinkToOneself(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	a.mustDial(a)
	require.Equal(t, 1, a.LiveLinks())
	require.Nil(t, a.mustLink(1).Session())
	_, err := a.dialTo(a.address)
	require.ErrorIs(t, err, status.AlreadyLink)
	require.NoError(t, a.unlink(1, a.address, false))
	require.Zero(t, a.LiveLinks())
	a.mustDial(a)
	require.NoError(t, a.unlink(1, "", true))
	require.Zero(t, a.LiveLinks())
}

func TestNobodyListens(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	require.NoError(t, b.StopListening())
	require.NoError(t, b.StopListening())
	_, err := a.dialTo(b.address)
	require.ErrorIs(t, err, status.LinkFailed)
	_, err = a.dialTo("no address")
	require.ErrorIs(t, err, status.LinkFailed)
	_, err = a.Listen(a.address)
	require.ErrorIs(t, err, status.Failed)
	_, err = b.Listen(a.address)
	require.ErrorIs(t, err, status.Failed)
	bound, err := b.Listen(b.address)
	require.NoError(t, err)
	require.Equal(t, b.address, bound)
	a.mustDial(b)
	require.NoError(t, b.StopListening())
	requireJoined(t, a, b) // accepted links live on
}

func TestSilentAcceptorIsATimeout(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0") // the kernel connects, nobody answers
	require.NoError(t, err)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err = a.Dial(ctx, DialRequest{Address: l.Addr().String(), GivenID: 5, HasGivenID: true})
	require.ErrorIs(t, err, status.Timeout)
	require.Contains(t, a.Explain(5), "last failure")
	ctx, cancel = context.WithCancel(context.Background())
	cancel()
	_, err = a.Dial(ctx, DialRequest{Address: l.Addr().String()})
	require.ErrorIs(t, err, status.Failed)
	err = a.Unlink(ctx, 5, l.Addr().String(), false)
	require.Error(t, err)
}

func TestSessionThatCanNotBeMade(t *testing.T) {
	for _, end := range []string{"dialer", "acceptor"} {
		t.Run(end, func(t *testing.T) {
			check(t)
			fail := func(c *Config) {
				c.Gift = giving("a gift that nobody takes", "1", "2")
				c.Attach = func(_ Peer, conns []transport.Conn) (Attached, error) {
					for _, c := range conns {
						_ = c.Close()
					}
					return Attached{}, status.New(status.LinkFailed, status.StageHandshake, "shm is required: no memory for it")
				}
			}
			nothing := func(c *Config) { c.Gift = giving("another one", "3") }
			changes := map[string][2]func(*Config){"dialer": {fail, nothing}, "acceptor": {nothing, fail}}[end]
			a, b := newNode(t, 1, changes[0]), newNode(t, 2, changes[1])
			_, err := a.dialTo(b.address)
			require.ErrorContains(t, err, "shm is required: no memory for it")
			require.ErrorIs(t, err, status.LinkFailed)
			require.Contains(t, a.Explain(2), "shm is required: no memory for it")
			require.Zero(t, a.LiveLinks())
			known := map[string]string{"dialer": "dead (peer died", "acceptor": "shm is required: no memory for it"}[end]
			require.Eventually(t, func() bool {
				return b.LiveLinks() == 0 && strings.Contains(b.Explain(1), known)
			}, patient, time.Millisecond)
		})
	}
}

func TestSessionThatFailsBeforeItIsInstalled(t *testing.T) {
	for _, end := range []string{"dialer", "acceptor"} {
		t.Run(end, func(t *testing.T) {
			check(t)
			var once sync.Once
			fail := func(c *Config) {
				c.Attach = func(p Peer, conns []transport.Conn) (Attached, error) {
					a, err := attach(p, conns)
					once.Do(func() {
						go p.Fail(errors.New("torn at once"))
						<-p.link.Dead()
					})
					return a, err
				}
			}
			changes := map[string][2][]func(*Config){"dialer": {{fail}, nil}, "acceptor": {nil, {fail}}}[end]
			a, b := newNode(t, 1, changes[0]...), newNode(t, 2, changes[1]...)
			_, err := a.dialTo(b.address)
			require.ErrorContains(t, err, "torn at once")
			require.Zero(t, a.LiveLinks())
			require.Eventually(t, func() bool { return b.LiveLinks() == 0 }, patient, time.Millisecond)
			a.mustDial(b)
			requireJoined(t, a, b)
		})
	}
}

func TestConnectionThatCanNotBeTakenOver(t *testing.T) {
	for _, end := range []string{"dialer", "acceptor"} {
		t.Run(end, func(t *testing.T) {
			check(t)
			a, b := newNode(t, 1), newNode(t, 2)
			broken := map[string]*node{"dialer": a, "acceptor": b}[end]
			taken := 0
			broken.net.NewData = func(c net.Conn) (transport.Conn, error) {
				if taken++; taken == 2 {
					_ = c.Close()
					return nil, errors.New("no such thing")
				}
				return &testConn{c}, nil
			}
			_, err := a.dialTo(b.address)
			require.ErrorIs(t, err, status.LinkFailed)
			require.ErrorContains(t, err, "no such thing")
			a.mustDial(b)
			requireJoined(t, a, b)
		})
	}
}

func TestTheNewestDecisionCounts(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	attempts := make([]*attempt, 3)
	for i := range attempts {
		near, far := net.Pipe()
		defer far.Close()
		attempts[i] = a.newAttempt(context.Background(), Descriptors{}.own(near))
		attempts[i].pair = a.acquirePair(Incarnation{7})
	}
	require.NoError(t, attempts[0].obey(1))
	var finished sync.WaitGroup
	finished.Go(func() {
		<-attempts[0].ctx.Done() // it has to go for the newer one
		attempts[0].finish()
	})
	require.NoError(t, attempts[1].obey(3))
	finished.Wait()
	require.ErrorIs(t, context.Cause(attempts[0].ctx), errSuperseded)
	require.ErrorIs(t, attempts[2].obey(2), errSuperseded, "a late decision")
	attempts[2].finish()
	attempts[1].finish()
	require.Equal(t, uint64(3), a.pairs[Incarnation{7}].retired)
}

func TestUnlinkEndsBothEnds(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	require.NoError(t, a.unlink(2, b.address, false), "nothing is linked")
	a.mustDial(b)
	la, lb := a.mustLink(2), b.mustLink(1)
	require.NoError(t, a.unlink(2, b.address, false))
	require.Zero(t, a.LiveLinks())
	require.Zero(t, b.LiveLinks())
	for _, l := range []*Link{la, lb} {
		cause := <-l.Session().(*fakeSession).closed
		require.ErrorIs(t, cause, status.Failed)
		require.ErrorContains(t, cause, "unlinked")
		require.Empty(t, l.Session().(*fakeSession).closed, "closed twice")
	}
	_, err := b.Link(1)
	require.ErrorIs(t, err, status.NotYetLink)
	require.ErrorContains(t, err, "unlinked by the peer")
	require.NoError(t, a.unlink(2, b.address, false), "twice in a row")
	require.False(t, a.saw("peer died"))
	require.False(t, b.saw("peer died"))
	b.mustDial(a)
	requireJoined(t, a, b)
}

func TestUnlinkWaitsForOperations(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	lb := b.mustLink(1)
	end := lb.Session().(*fakeSession).work()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, a.Unlink(ctx, 2, b.address, false), status.Timeout)
	require.Eventually(t, func() bool { _, err := b.Link(1); return err == nil }, patient, time.Millisecond, "serves again")
	requireJoined(t, a, b)

	done := make(chan error)
	go func() { done <- a.unlink(2, b.address, false) }()
	require.Eventually(t, func() bool { _, err := b.Link(1); return err != nil }, patient, time.Millisecond, "takes no new operation")
	require.Equal(t, 1, b.LiveLinks())
	select {
	case err := <-done:
		require.Fail(t, "did not wait", "%v", err)
	default:
	}
	end()
	require.NoError(t, <-done)
	require.Zero(t, b.LiveLinks())
}

func TestUnlinkThatCanNotReachThePeerKeepsTheLink(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	require.NoError(t, b.StopListening())
	require.ErrorIs(t, a.unlink(2, b.address, false), status.UnlinkFailed)
	requireJoined(t, a, b)
	b.stop()
	requireDead(t, a.mustLinkOrDead(2), patient)
	require.NoError(t, a.unlink(2, b.address, false), "a dead link needs no network")
	require.NoError(t, a.unlink(77, "", true), "an id that was never met")
}

// mustLinkOrDead returns the newest link to id.
func (n *node) mustLinkOrDead(id uint64) *Link {
	n.Manager.mu.Lock()
	defer n.Manager.mu.Unlock()
	require.NotNil(n.t, n.records[id].link)
	return n.records[id].link
}

func TestCloseWithDialsInFlight(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer silent.Close()
	errs := make(chan error, 16)
	for range 16 {
		go func() {
			_, err := a.Dial(context.Background(), DialRequest{Address: silent.Addr().String()})
			errs <- err
		}()
	}
	var held []net.Conn
	for range 16 {
		c, err := silent.Accept()
		require.NoError(t, err)
		held = append(held, c)
	}
	a.stop()
	for range 16 {
		require.ErrorIs(t, <-errs, status.EngineFinalized)
	}
	for _, c := range held {
		_ = c.Close()
	}
	_, err = a.dialTo("127.0.0.1:1")
	require.ErrorIs(t, err, status.EngineFinalized)
	_, err = a.Listen("127.0.0.1:0")
	require.ErrorIs(t, err, status.EngineFinalized)
	require.ErrorIs(t, a.unlink(1, "", true), status.EngineFinalized)
}

func TestManyLinksAndConcurrentCalls(t *testing.T) {
	check(t)
	const n = 6
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = newNode(t, uint64(i+1))
	}
	var calls sync.WaitGroup
	for _, from := range nodes {
		for _, to := range nodes {
			if from == to {
				continue
			}
			calls.Go(func() {
				for i := range 5 {
					_, err := from.dialTo(to.address)
					code := status.CodeOf(err)
					// An unlink of the other end may come in between and break the exchange.
					require.Contains(t, []status.Code{status.Success, status.AlreadyLink, status.Failed, status.LinkFailed}, code, "%v", err)
					_ = from.Explain(to.cfg.ClusterID)
					if i < 4 {
						_ = from.unlink(to.cfg.ClusterID, to.address, i%2 == 0)
					}
				}
			})
		}
	}
	calls.Wait()
	for _, from := range nodes {
		for _, to := range nodes {
			if from == to {
				continue
			}
			_, err := from.dialTo(to.address)
			require.True(t, err == nil || errors.Is(err, status.AlreadyLink), "%v", err)
		}
	}
	for _, from := range nodes {
		require.Equal(t, n-1, from.LiveLinks())
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := NewManager(Config{})
	require.ErrorIs(t, err, status.ParamInvalid)
	n := newNode(t, 1)
	cfg := n.cfg
	cfg.DataConnections = MaxDataConnections + 1
	_, err = NewManager(cfg)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.False(t, strings.Contains(n.Explain(1), "link"))
}
