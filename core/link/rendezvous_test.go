// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// duo is a meeting of the clusters 1, the root, and 2.
var duo = Meeting{Name: "duo", Digest: [32]byte{7}, Members: []Member{{Cluster: 1}, {Cluster: 2, Rank: 1}}}

// trio is duo with cluster 3 as a third member.
var trio = Meeting{Name: duo.Name, Digest: duo.Digest, Members: append([]Member{{Cluster: 3, Rank: 2}}, duo.Members...)}

const somewhere = "127.0.0.1:1" // an address that nobody dials here

var (
	rootOfDuo   = Attendee{Cluster: 1, Address: somewhere}
	memberOfDuo = Attendee{Cluster: 2, Rank: 1, Address: somewhere}
)

// gather opens a gathering of duo at a free port.
func (n *node) gather() (*Gathering, string) {
	n.t.Helper()
	g, err := n.Gather("127.0.0.1:0", duo, rootOfDuo)
	require.NoError(n.t, err)
	return g, g.hub.listener.Addr().String()
}

// bring announces the member until the group is complete, and requires that both ends hear of each other.
func (n *node) bring(root *node, g *Gathering, address string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	heard := make(chan error, 1)
	var theirs []Attendee
	go func() {
		var err error
		theirs, err = g.Wait(ctx)
		heard <- err
	}()
	ours, err := n.Announce(ctx, []string{address}, duo, memberOfDuo)
	require.NoError(n.t, err)
	require.NoError(n.t, <-heard)
	require.Equal(n.t, ours, theirs)
	again, err := n.Announce(ctx, []string{address}, duo, memberOfDuo)
	require.NoError(n.t, err, "the roster may have been lost on its way")
	require.Equal(n.t, ours, again)
	g.Close()
	require.Equal(n.t, []Incarnation{root.incarnation, n.incarnation}, []Incarnation{ours[0].Incarnation, ours[1].Incarnation})
}

// sayTo sends bytes to address; the connection stays until the test ends.
func sayTo(t *testing.T, address string, said []byte) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	_, err = c.Write(said)
	require.NoError(t, err)
	return c
}

func announcing(change func(*announcement)) []byte {
	a := announcement{Name: duo.Name, Digest: duo.Digest[:], Attendee: memberOfDuo}
	change(&a)
	return appendBlock(ourPreamble(intentAnnounce).append(nil), a)
}

func TestStrangersAtARendezvousAddressAreTurnedAway(t *testing.T) {
	otherMajor := ourPreamble(intentAnnounce).append(nil)
	otherMajor[len(magic)]++
	for name, said := range map[string][]byte{
		"http":            []byte("GET / HTTP/1.1\r\nHost: me\r\n\r\n"),
		"other intent":    ourPreamble(intentControl).append(nil),
		"other version":   otherMajor,
		"large":           append(ourPreamble(intentAnnounce).append(nil), 0xff, 0xff, 0xff, 0xff),
		"nested":          append(append(ourPreamble(intentAnnounce).append(nil), 40, 0, 0, 0), repeated(0x81, 40)...),
		"no group":        announcing(func(a *announcement) { a.Name = "solo" }),
		"another digest":  announcing(func(a *announcement) { a.Digest = a.Digest[1:] }),
		"no member":       announcing(func(a *announcement) { a.Attendee.Cluster = 3 }),
		"another rank":    announcing(func(a *announcement) { a.Attendee.Rank = 2 }),
		"the root itself": announcing(func(a *announcement) { a.Attendee = rootOfDuo }),
		"long name":       announcing(func(a *announcement) { a.Name = strings.Repeat("n", mostMeetingName+1) }),
		"no address":      announcing(func(a *announcement) { a.Attendee.Address = "localhost:http" }),
		"odd zone":        announcing(func(a *announcement) { a.Attendee.Address = "[fe80::1%\n]:80" }),
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			root, member := newNode(t, 1), newNode(t, 2)
			g, address := root.gather()
			c := sayTo(t, address, said)
			require.NoError(t, c.SetReadDeadline(time.Now().Add(helloTimeout/2)))
			_, err := io.Copy(io.Discard, c)
			var late net.Error
			require.False(t, errorsAs(err, &late) && late.Timeout(), "still open: it should not wait for more")
			member.bring(root, g, address)
		})
	}
}

func TestSilentStrangersAtARendezvousAddressAreBounded(t *testing.T) {
	check(t)
	root, member := newNode(t, 1), newNode(t, 2)
	g, address := root.gather()
	for range maxStrangers + 20 {
		sayTo(t, address, []byte(magic[:4]))
	}
	member.bring(root, g, address) // all places are taken, and yet
}

// pipes is a network on which a write waits until it is read.
type pipes struct {
	Network
	conns chan net.Conn
}

func (p *pipes) Listen(string) (net.Listener, error) {
	return pipeListener{p.conns, make(chan struct{})}, nil
}

func (p *pipes) Prover() Prover { return nil }

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l pipeListener) Close() error { close(l.closed); return nil }

func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

func (l pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// say sends what is read at the other end.
func (p *pipes) say(t *testing.T, said []byte) *conn {
	t.Helper()
	ours, theirs := net.Pipe()
	p.conns <- theirs
	_, err := ours.Write(said)
	require.NoError(t, err)
	return new(Descriptors).own(ours)
}

func TestMemberThatAnnouncesItselfAgainAndAgainIsAnsweredOnceAtATime(t *testing.T) {
	check(t)
	synctest.Test(t, func(t *testing.T) {
		network := &pipes{conns: make(chan net.Conn)}
		root, err := NewManager(Config{Network: network, Attach: func(Peer, []transport.Conn) (Attached, error) { return Attached{}, io.EOF }})
		require.NoError(t, err)
		g, err := root.Gather(somewhere, duo, rootOfDuo)
		require.NoError(t, err)
		said := announcing(func(*announcement) {})
		var deaf []*conn
		for range mostAnswered {
			deaf = append(deaf, network.say(t, said))
			synctest.Wait()
		}
		goroutines := runtime.NumGoroutine()
		for range 3 * maxHandshakes {
			c := network.say(t, said)
			_, err := readAnswer(c, intentAnnounce)
			require.ErrorContains(t, err, "being told the roster")
			require.NoError(t, c.Close())
		}
		synctest.Wait()
		for range 1_000_000 { // Wait may return before the last one that has ended has left the runtime's count
			if runtime.NumGoroutine() <= goroutines {
				break
			}
			runtime.Gosched()
		}
		require.LessOrEqual(t, runtime.NumGoroutine(), goroutines)
		time.Sleep(helloTimeout + drainFor) // virtual time: those that read nothing are let go
		synctest.Wait()
		c := network.say(t, said)
		_, err = readAnswer(c, intentAnnounce)
		require.NoError(t, err)
		var all roster
		require.NoError(t, readFrame(c, frameRoster, &all))
		require.NoError(t, all.check(&duo))
		g.Close()
		for _, c := range append(deaf, c) {
			require.NoError(t, c.Close())
		}
		require.NoError(t, root.Close())
	})
}

func TestMemberThatTalksOutOfTurnLosesItsPlace(t *testing.T) {
	check(t)
	root, member := newNode(t, 1), newNode(t, 2)
	g, err := root.Gather("127.0.0.1:0", trio, rootOfDuo)
	require.NoError(t, err)
	address := g.hub.listener.Addr().String()
	c := sayTo(t, address, announcing(func(*announcement) {}))
	_, err = readPreamble(c)
	require.NoError(t, err)
	require.Equal(t, 2, Seated())
	_, err = member.announceAt(context.Background(), address, &duo, memberOfDuo)
	require.ErrorContains(t, err, "taken")
	_, err = c.Write([]byte{1})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return Seated() == 1 }, patient, time.Millisecond)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = g.Wait(ctx)
	g.Close()
	require.ErrorContains(t, err, "cluster 3 (rank 2), cluster 2 (rank 1)")
}

func TestGatheringsOfOneNetworkShareAListener(t *testing.T) {
	check(t)
	root, member := newNode(t, 1), newNode(t, 2)
	first, address := root.gather()
	again, err := root.Gather("127.0.0.1:0", Meeting{Name: "other", Members: duo.Members}, rootOfDuo)
	require.NoError(t, err)
	require.Same(t, first.hub, again.hub)
	member.bring(root, first, address)
	sayTo(t, address, nil) // the other group still listens
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_, err = again.Wait(ctx)
	require.ErrorIs(t, err, status.Timeout)
	again.Close()
	_, err = net.Dial("tcp", address)
	require.Error(t, err, "the last group has closed the listener")
}

func TestMemberHearsThatTheRootHasGivenUp(t *testing.T) {
	check(t)
	root, member := newNode(t, 1), newNode(t, 2)
	g, err := root.Gather("127.0.0.1:0", trio, rootOfDuo)
	require.NoError(t, err)
	heard := make(chan error, 1)
	address := g.hub.listener.Addr().String()
	go func() {
		_, err := member.announceAt(context.Background(), address, &duo, memberOfDuo)
		heard <- err
	}()
	require.Eventually(t, func() bool { return Seated() == 2 }, patient, time.Millisecond)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = g.Wait(ctx)
	require.Error(t, err)
	g.Close()
	require.ErrorContains(t, <-heard, "rank 0 has given the group up")
}

// answering accepts one connection after the other, reads an announcement and writes answer.
func answering(t *testing.T, answer []byte) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(answer)
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l.Addr().String()
}

func TestRosterThatIsNotTheGroupsIsRefused(t *testing.T) {
	check(t)
	with := func(body []byte) []byte {
		return appendFrame(ourPreamble(intentAnnounce).append(nil), frameRoster, body)
	}
	member := newNode(t, 2)
	for name, answer := range map[string][]byte{
		"nonsense":    []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"nobody":      with(encode(roster{})),
		"others":      with(encode(roster{[]Attendee{rootOfDuo, {Cluster: 5, Rank: 1, Address: somewhere}}})),
		"no address":  with(encode(roster{[]Attendee{rootOfDuo, {Cluster: 2, Rank: 1}}})),
		"wrong types": with([]byte{0xa1, 0x01, 0x01}),
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			_, err := member.Announce(ctx, []string{answering(t, answer)}, duo, memberOfDuo)
			require.ErrorIs(t, err, status.Timeout)
			require.ErrorContains(t, err, "announce at 127.0.0.1:")
		})
	}
}

func TestCloseEndsAnnouncingAndAwaiting(t *testing.T) {
	check(t)
	n := newNode(t, 2)
	ended := make(chan error, 2)
	go func() {
		_, err := n.Announce(context.Background(), []string{"127.0.0.1:1"}, duo, memberOfDuo)
		ended <- err
	}()
	go func() { ended <- n.Await(context.Background(), 1, Incarnation{1}) }()
	require.NoError(t, n.Close())
	for range 2 {
		require.ErrorIs(t, <-ended, status.EngineFinalized)
	}
}

func TestFurtherListeners(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	bound, stop, err := b.ListenBeside("127.0.0.1:0")
	require.NoError(t, err)
	require.NotEqual(t, bound, b.ListenAddress())
	_, _, err = b.ListenBeside(bound)
	require.ErrorIs(t, err, status.Failed)
	awaited := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	go func() { awaited <- b.Await(ctx, 1, a.incarnation) }()
	_, err = a.dialTo(bound)
	require.NoError(t, err)
	require.NoError(t, <-awaited)
	stop()
	stop()
	requireJoined(t, a, b)
	_, err = net.Dial("tcp", bound)
	require.Error(t, err)
	_, stop, err = b.ListenBeside("127.0.0.1:0") // which Close closes
	require.NoError(t, err)
	b.stop()
	stop()
	_, _, err = b.ListenBeside("127.0.0.1:0")
	require.ErrorIs(t, err, status.EngineFinalized)
}

func TestExactDialTakesNoOtherEngine(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	exact := DialRequest{Address: b.address, GivenID: 2, HasGivenID: true, NameOnly: true, Exact: true, Incarnation: b.incarnation}
	for _, change := range []func(*DialRequest){
		func(r *DialRequest) { r.GivenID = 3 },
		func(r *DialRequest) { r.Incarnation[0]++ },
	} {
		r := exact
		change(&r)
		_, err := a.Dial(context.Background(), r)
		require.ErrorIs(t, err, status.LinkFailed)
		require.ErrorContains(t, errors.New(a.Explain(r.GivenID)), "the engine that answers")
		require.Zero(t, a.LiveLinks())
		require.Zero(t, b.LiveLinks())
	}
	_, err := a.Dial(context.Background(), exact)
	require.NoError(t, err)
	requireJoined(t, a, b)
	_, err = a.Dial(context.Background(), exact)
	require.ErrorIs(t, err, status.AlreadyLink)
}

func FuzzAnnouncement(f *testing.F) {
	f.Add(announcing(func(*announcement) {})[preambleBytes:])
	f.Fuzz(func(t *testing.T, b []byte) {
		var a announcement
		if readBlock(strings.NewReader(string(b)), &a) != nil || a.Attendee.check() != nil {
			return
		}
		require.NotContains(t, a.Attendee.Address, "\n")
		h := &hub{gatherings: []*Gathering{newGathering(duo)}}
		if g, place, err := h.seat(a); err == nil {
			require.Equal(t, duo.Members[place], Member{a.Attendee.Cluster, a.Attendee.Rank})
			require.Equal(t, 1, g.missing)
		}
	})
}
