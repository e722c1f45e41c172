// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// eachSocket runs a test with two ends of a loopback connection, and of one of Unix sockets, and memory for their bytes.
func eachSocket(t *testing.T, test func(t *testing.T, a, b transport.Conn, spans []mem.Span)) {
	for name, conns := range map[string]func(t testing.TB, lanes int) (a, b []transport.Conn){"loopback": loopbackConns, "unix": unixConns} {
		t.Run(name, func(t *testing.T) {
			check(t)
			as, bs := conns(t, 1)
			defer closeBoth(t, as[0], bs[0])
			test(t, as[0], bs[0], someSpans(t))
		})
	}
}

// connPair makes two ends of a loopback connection and memory for their bytes.
func connPair(t *testing.T) (a, b transport.Conn, spans []mem.Span) {
	as, bs := loopbackConns(t, 1)
	return as[0], bs[0], someSpans(t)
}

func someSpans(t *testing.T) []mem.Span {
	m, err := mem.NewBuffer(4096)
	require.NoError(t, err)
	keep(m)
	return []mem.Span{{Addr: m.Addr(), Bytes: 10}, {Addr: m.Addr() + 100, Bytes: 20}}
}

func closeBoth(t *testing.T, conns ...transport.Conn) {
	for _, c := range conns {
		require.NoError(t, c.Close())
	}
}

func TestConnWaitsAsLongAsItSays(t *testing.T) {
	eachSocket(t, func(t *testing.T, a, b transport.Conn, spans []mem.Span) {
		n, err := a.TryReceive(spans)
		require.NoError(t, err)
		require.Zero(t, n)
		began := time.Now()
		for time.Since(began) < transport.MaxWaitMillis*time.Millisecond { // the runtime's signals may end a wait early
			n, err = a.Receive(spans)
			require.NoError(t, err)
			require.Zero(t, n)
		}
		require.Less(t, time.Since(began), soon)
		n, err = b.Send(spans)
		require.NoError(t, err)
		require.Equal(t, 30, n)
		n, err = a.Receive(spans)
		require.NoError(t, err)
		require.Equal(t, 30, n)
	})
}

func TestConnSendWaitsNoLongerThanItSays(t *testing.T) {
	eachSocket(t, func(t *testing.T, a, _ transport.Conn, _ []mem.Span) {
		big, err := mem.NewBuffer(1 << 20)
		require.NoError(t, err)
		keep(big)
		all := []mem.Span{{Addr: big.Addr(), Bytes: 1 << 20}}
		for {
			n, err := a.TrySend(all)
			require.NoError(t, err)
			if n == 0 {
				break
			}
		}
		began := time.Now()
		_, err = a.Send(all)
		require.NoError(t, err)
		require.Less(t, time.Since(began), soon)
	})
}

func TestConnSendWaitsNoLongerForAPeerThatReadsLittle(t *testing.T) {
	eachSocket(t, func(t *testing.T, a, b transport.Conn, _ []mem.Span) {
		const bytes, sip = 4 << 20, 40 << 10
		m, err := mem.NewBuffer(bytes + sip)
		require.NoError(t, err)
		keep(m)
		all := []mem.Span{{Addr: m.Addr(), Bytes: bytes}}
		for n := 1; n > 0; {
			n, err = a.TrySend(all)
			require.NoError(t, err)
		}
		sips := time.NewTicker(60 * time.Millisecond)
		defer sips.Stop()
		sent, drunk := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(drunk)
			for {
				select {
				case <-sips.C:
					_, _ = b.TryReceive([]mem.Span{{Addr: m.Addr() + bytes, Bytes: sip}})
				case <-sent:
					return
				}
			}
		}()
		began := time.Now()
		_, err = a.Send(all)
		took := time.Since(began)
		close(sent)
		<-drunk
		require.NoError(t, err)
		require.Less(t, took, 10*transport.MaxWaitMillis*time.Millisecond)
	})
}

func TestParkEndsByDataByThePeersEndAndByShutdown(t *testing.T) {
	for name, end := range map[string]func(a, b transport.Conn, spans []mem.Span){
		"data":     func(_, b transport.Conn, spans []mem.Span) { _, _ = b.Send(spans) },
		"peer":     func(_, b transport.Conn, _ []mem.Span) { b.Shutdown() },
		"shutdown": func(a, _ transport.Conn, _ []mem.Span) { a.Shutdown() },
	} {
		t.Run(name, func(t *testing.T) {
			eachSocket(t, func(t *testing.T, a, b transport.Conn, spans []mem.Span) { requireParkEnds(t, a, b, spans, end) })
		})
	}
}

func requireParkEnds(t *testing.T, a, b transport.Conn, spans []mem.Span, end func(a, b transport.Conn, spans []mem.Span)) {
	parked := make(chan struct{})
	go func() {
		a.Park()
		close(parked)
	}()
	p := a.(*Conn).poller
	require.Eventually(t, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		_, listed := p.parked[a.(*Conn).fd]
		return listed
	}, settleTime, time.Millisecond, "it does not park")
	require.False(t, isClosed(parked))
	end(a, b, spans)
	receiveFrom(t, parked)
	end(a, b, spans)
	a.Park() // what was there before it parks counts too
	p.mu.Lock()
	require.Empty(t, p.parked)
	p.mu.Unlock()
}

func TestConnAfterShutdown(t *testing.T) {
	eachSocket(t, func(t *testing.T, a, b transport.Conn, spans []mem.Span) {
		a.Shutdown()
		a.Shutdown()
		for range 3 {
			_, err := a.Receive(spans)
			require.ErrorIs(t, err, io.EOF)
			_, err = a.TryReceive(spans)
			require.ErrorIs(t, err, io.EOF)
			_, err = a.Send(spans)
			require.Error(t, err)
			_, err = a.TrySend(spans)
			require.Error(t, err)
			_, err = b.Receive(spans)
			require.ErrorIs(t, err, io.EOF)
		}
	})
}

func TestShutdownEndsCallsThatWait(t *testing.T) {
	eachSocket(t, func(t *testing.T, a, _ transport.Conn, spans []mem.Span) {
		ended := make(chan error, 1)
		go func() {
			for {
				if _, err := a.Receive(spans); err != nil {
					ended <- err
					return
				}
			}
		}()
		a.Shutdown()
		require.ErrorIs(t, receiveFrom(t, ended), io.EOF)
	})
}

func TestPollerLivesAsLongAsConnections(t *testing.T) {
	check(t)
	require.Nil(t, shared.poller)
	a, b, _ := connPair(t)
	p := shared.poller
	require.NotNil(t, p)
	require.Same(t, p, a.(*Conn).poller)
	closeBoth(t, a)
	require.False(t, isClosed(p.stopped))
	closeBoth(t, b)
	require.True(t, isClosed(p.stopped))
	require.Nil(t, shared.poller)
	a, b, _ = connPair(t)
	require.NotSame(t, p, shared.poller)
	closeBoth(t, a, b)
	require.Nil(t, shared.poller)
}

func TestPathNamesBothEndsAndTheCongestionControl(t *testing.T) {
	check(t)
	a, b, _ := connPair(t)
	defer closeBoth(t, a, b)
	require.Regexp(t, `^127\.0\.0\.1:\d+ -> 127\.0\.0\.1:\d+, congestion control (cubic|reno|\w+ \(cubic is not allowed here: .*\))$`, a.Path())
}

func TestPathOfUnixSocketsNamesBothEnds(t *testing.T) {
	check(t)
	as, bs := unixConns(t, 2)
	defer closeBoth(t, append(as, bs...)...)
	require.Regexp(t, `^@[0-9a-f]{5} -> @llm-datadist-test-\w+, Unix sockets$`, as[0].Path())
	require.NotEqual(t, as[0].Path(), as[1].Path())
	for i := range as {
		number, local := as[i].(*Conn).LocalPath()
		require.True(t, local)
		same, local := bs[i].(*Conn).LocalPath()
		require.True(t, local)
		require.Equal(t, number, same, "both ends come to the same core by it")
	}
}

func TestIsLocalPath(t *testing.T) {
	at := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	require.True(t, isLocalPath(at("127.0.0.1"), at("127.0.0.1")))
	require.True(t, isLocalPath(at("10.0.0.1"), at("10.0.0.1")))
	require.False(t, isLocalPath(at("10.0.0.1"), at("10.0.0.2")))
	require.False(t, isLocalPath(&net.UnixAddr{}, at("10.0.0.2")))
}

func TestWhatIsNoSocketIsRefusedAndClosed(t *testing.T) {
	check(t)
	a, b := net.Pipe()
	_, err := NewConn(a)
	require.ErrorContains(t, err, "*net.pipe")
	_, err = b.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, b.Close())
}
