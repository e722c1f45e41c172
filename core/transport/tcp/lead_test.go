// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// counted counts the calls on a connection that brought or took bytes, and those that did not.
type counted struct {
	transport.Conn
	receives, sends, empty atomic.Int64
}

func (c *counted) Receive(spans []mem.Span) (int, error) {
	return c.count(&c.receives)(c.Conn.Receive(spans))
}

func (c *counted) TryReceive(spans []mem.Span) (int, error) {
	return c.count(&c.receives)(c.Conn.TryReceive(spans))
}

func (c *counted) Send(spans []mem.Span) (int, error) { return c.count(&c.sends)(c.Conn.Send(spans)) }

func (c *counted) TrySend(spans []mem.Span) (int, error) {
	return c.count(&c.sends)(c.Conn.TrySend(spans))
}

func (c *counted) count(kind *atomic.Int64) func(int, error) (int, error) {
	return func(n int, err error) (int, error) {
		if n > 0 {
			kind.Add(1)
		} else {
			c.empty.Add(1)
		}
		return n, err
	}
}

// Watch and Batch go to the connection below where it has them.
func (c *counted) Watch(on bool) {
	if below, ok := c.Conn.(watched); ok {
		below.Watch(on)
	}
}

func (c *counted) Batch(bytes int) {
	if below, ok := c.Conn.(batched); ok {
		below.Batch(bytes)
	}
}

func TestSmallPullCostsFiveSystemCallsThatMoveBytes(t *testing.T) {
	check(t)
	rawA, rawB := loopbackConns(t, 1)
	a, b := &counted{Conn: rawA[0]}, &counted{Conn: rawB[0]}
	l := newLink(t, &link{}, []transport.Conn{a}, []transport.Conn{b})
	src, dst := newCache(t, plan.Blocks, 1, 16, 16<<10).randomize(1), newCache(t, plan.Blocks, 1, 16, 16<<10)
	l.ownerB.offer(1, &offer{cache: src})
	pull := func() {
		require.NoError(t, l.a.Pull(within(t, settleTime), blocks(1, dst, []uint64{3}, []uint64{4}), dst.local()))
	}
	pull()
	const pulls = 50
	for _, c := range []*counted{a, b} {
		c.receives.Store(0)
		c.sends.Store(0)
	}
	for range pulls {
		pull()
	}
	require.InDelta(t, pulls, a.sends.Load(), 1, "one for the request") // a call is counted a moment after its bytes can be seen
	require.InDelta(t, pulls, b.sends.Load(), 1, "one for entry and bytes")
	require.LessOrEqual(t, b.receives.Load(), int64(pulls+pulls/4), "one for the request")
	require.LessOrEqual(t, a.receives.Load(), int64(3*pulls), "two: entry with the header of the data, and the bytes")
}

func TestPullAllocatesNextToNothing(t *testing.T) {
	if testkit.Raced {
		t.Skip("the race detector makes pools forget")
	}
	check(t)
	l := loopback(t, 1)
	src, dst := newCache(t, plan.Blocks, 4, 16, 1<<10).randomize(1), newCache(t, plan.Blocks, 4, 16, 1<<10)
	l.ownerB.offer(1, &offer{cache: src})
	req, local := blocks(1, dst, []uint64{3}, []uint64{4}), dst.local()
	deadline := time.Now().Add(time.Minute)
	allocations := testing.AllocsPerRun(200, func() {
		op, err := l.a.Begin(deadline, req, local)
		if err != nil {
			panic(err)
		}
		for !op.Advance(time.Second) {
		}
		if err := op.Finish(context.Background()); err != nil {
			panic(err)
		}
	})
	// None of these is the initiator's. The owner makes the operation, its timer and the timer's function; the test's own owner makes a
	// source with a channel, and room to remember it.
	require.LessOrEqual(t, allocations, 6.0)
}

func TestWhoWaitsForASmallPullReceivesItself(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	result := pulling(s, within(t, settleTime), rows(1, dst), dst)
	h, _ := raw.next()
	require.NotZero(t, h.flags&flagOneLane)
	l := s.lanes[0]
	require.Eventually(t, func() bool { return len(l.turn) == 0 }, settleTime, time.Millisecond, "nobody receives")
	require.Zero(t, l.callers.Load(), "the caller has the turn")
	raw.entry(h.operation, rows(1, dst), dst.shape, false)
	raw.data(h.operation, 0, make([]byte, dst.shape.Stride), 0)
	require.NoError(t, receiveFrom(t, result))
	require.Eventually(t, func() bool { return len(l.turn) == 1 }, settleTime, time.Millisecond, "the turn is free again")
}

// The one who receives places what comes for others, and its own end does not wait for theirs.
func TestReceivingCallerServesOthersAndLeavesInMidFrame(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	other := newCache(t, plan.Contiguous, 1, 1, 100_000)
	first := pulling(s, within(t, settleTime), rows(1, dst), dst)
	h1, _ := raw.next()
	second := pulling(s, within(t, settleTime), rows(1, other), other)
	h2, _ := raw.next()
	raw.entry(h1.operation, rows(1, dst), dst.shape, false)
	raw.entry(h2.operation, rows(1, other), other.shape, false)
	wantFirst, wantSecond := newCache(t, plan.Contiguous, 1, 1, 100_000).randomize(5), newCache(t, plan.Contiguous, 1, 1, 100_000).randomize(6)
	raw.data(h1.operation, 0, wantFirst.tensors[0].Bytes(), 0)
	frame := dataFrame(h2.operation, 0, wantSecond.tensors[0].Bytes(), 0)
	raw.write(frame[:60_000])
	require.NoError(t, receiveFrom(t, first), "it does not wait for the other's bytes")
	raw.write(frame[60_000:])
	require.NoError(t, receiveFrom(t, second))
	dst.requireContent(t, wantFirst.content())
	other.requireContent(t, wantSecond.content())
}

func TestManyCallersTakeTurns(t *testing.T) {
	overEach(t, 2, func(t *testing.T, l *link) {
		src := newCache(t, plan.Blocks, 2, 32, 4096).randomize(1)
		l.ownerB.offer(1, &offer{cache: src})
		l.ownerA.offer(1, &offer{cache: src})
		var callers sync.WaitGroup
		for i := range 8 {
			s := l.a
			if i%4 == 3 { // some the other way
				s = l.b
			}
			dst := newCache(t, plan.Blocks, 2, 32, 4096)
			callers.Go(func() {
				for n := range uint64(60) {
					req := blocks(1, dst, []uint64{n % 32}, []uint64{(n + 1) % 32})
					want := dst.after(t, req, src)
					op, err := s.Begin(time.Now().Add(settleTime), req, dst.local())
					if err != nil {
						t.Error(err)
						return
					}
					for !op.Advance(80 * time.Millisecond) {
					}
					if err := op.Finish(context.Background()); err != nil {
						t.Error(err)
						return
					}
					dst.requireContent(t, want)
				}
			})
		}
		callers.Wait()
	})
}

func TestAdvanceEndsInTime(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		l := overFabric(t, 1, fabric.Faults{Latency: time.Second})
		src := newCache(t, plan.Contiguous, 1, 1, 1000).randomize(1)
		l.ownerB.offer(1, &offer{cache: src})
		op, err := l.a.Begin(time.Now().Add(time.Minute), rows(1, src), src.local())
		require.NoError(t, err)
		for _, wait := range []time.Duration{0, time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond} {
			began := time.Now()
			require.False(t, op.Advance(wait))
			require.LessOrEqual(t, time.Since(began), wait+leastLead)
		}
		require.True(t, op.Advance(time.Minute))
		require.True(t, op.Advance(0), "it stays so")
		require.NoError(t, op.Finish(context.Background()))
	})
}

func TestAdvanceLeavesTheConfirmationToFinish(t *testing.T) {
	check(t)
	l := loopback(t, 1)
	src := newCache(t, plan.Contiguous, 1, 1, 1000).randomize(1)
	l.ownerB.offer(1, &offer{cache: src, consumes: true})
	op, err := l.a.Begin(time.Now().Add(time.Minute), rows(1, src), src.local())
	require.NoError(t, err)
	require.False(t, op.Advance(settleTime), "Finish waits for the owner")
	require.NoError(t, op.Finish(within(t, settleTime)))
}

func TestReceivingCallerEndsWithItsSession(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	result := pulling(s, within(t, time.Minute), rows(1, dst), dst)
	raw.expect(kindRequest, 1)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close(errClosed)
	}()
	requireStatus(t, receiveFrom(t, result), status.NotYetLink, "the test is over")
	receiveFrom(t, closed)
}

// Payload that came along with a frame before it is copied to its place, or reported where that is not there.
func TestPayloadThatComesAheadOfItsTime(t *testing.T) {
	for name, unmapped := range map[string]bool{"mapped": false, "unmapped": true} {
		t.Run(name, func(t *testing.T) {
			check(t)
			a, b := loopbackConns(t, 1)
			newRaw(t, b[0])
			s := &Session{pulls: map[uint64]*pull{}} // nobody receives
			l, err := newLane(s, 0, a[0], seat{})
			require.NoError(t, err)
			t.Cleanup(l.release)
			s.lanes = []*lane{l}
			dst := newCache(t, plan.Blocks, 3, 4, 10)
			local := dst.local()
			if unmapped {
				local.Addrs[1] = hole(t, 8192, 4096) + 4096
			}
			req := blocks(1, dst, []uint64{1, 3}, []uint64{3, 0})
			p, err := s.start(time.Time{}, req, local, 0)
			require.NoError(t, err)
			src := newCache(t, plan.Blocks, 3, 4, 10).randomize(3)
			want := dst.after(t, req, src)
			plans := req.Plan
			segments, err := plan.Build(&plans, src.shape, dst.shape, nil)
			require.NoError(t, err)
			body := make([]byte, entryBytes)
			putEntry(body, &entry{shape: src.shape, total: 60, hash: plan.Hash(&plans, segments)})
			var payload []byte
			for _, g := range segments {
				payload = append(payload, src.tensors[g.SrcTensor].Bytes()[g.SrcOffset:][:g.Bytes]...)
			}
			// As when more was taken at once than ahead allows now.
			taken := append(frameOf(header{kind: kindEntry, operation: p.id}, body), dataFrame(p.id, 0, payload, 0)...)
			l.rx.have = copy(l.fixed.Bytes()[rxAt:], taken)
			require.NoError(t, l.digest())
			err = s.wait(within(t, settleTime), p)
			s.forget(p, p.id)
			for _, b := range s.buffers {
				require.NoError(t, b.Free())
			}
			if unmapped {
				requireStatus(t, err, status.ParamInvalid, "not mapped")
			} else {
				require.NoError(t, err)
				dst.requireContent(t, want)
			}
		})
	}
}

func TestParkedConnectionIsWokenOnlyWhileItIsWatched(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 1)
	waiting, sender := a[0].(*Conn), newRaw(t, b[0])
	t.Cleanup(func() { _ = waiting.Close() })
	waiting.Watch(false)
	parked := make(chan struct{})
	go func() {
		defer close(parked)
		waiting.Park()
	}()
	sender.write([]byte{1})
	select {
	case <-parked:
		require.Fail(t, "it was woken although somebody else receives")
	case <-time.After(50 * time.Millisecond):
	}
	waiting.Watch(true)
	receiveFrom(t, parked)
}

func TestReceiveWaitsForWhatIsCertainToCome(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 1)
	conn, raw := a[0].(*Conn), newRaw(t, b[0])
	t.Cleanup(func() { _ = conn.Close() })
	into, err := mem.NewBuffer(manyBytes)
	require.NoError(t, err)
	keep(into)
	conn.Batch(1000)
	raw.write(make([]byte, 100))
	got := make(chan int, 1)
	go func() {
		n, _ := conn.Receive([]mem.Span{{Addr: into.Addr(), Bytes: manyBytes}})
		got <- n
	}()
	raw.write(make([]byte, 2000))
	require.GreaterOrEqual(t, receiveFrom(t, got), 100, "what is there comes at the latest after MaxWaitMillis")
}

func TestNobodyPollsForLongWhereNothingIsUnderWay(t *testing.T) {
	s := &Session{spin: time.Second}
	require.True(t, s.polls(time.Now()))
	require.False(t, s.polls(time.Now().Add(-2*lingering)))
	s.open.Add(1)
	require.True(t, s.polls(time.Now().Add(-2*lingering)))
	require.False(t, s.polls(time.Now().Add(-time.Second)))
	require.False(t, (&Session{spin: -1}).polls(time.Now()))
	require.LessOrEqual(t, defaultSpin, 100*time.Microsecond)
}

func TestPullsWhereBothEndsSpin(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 2)
	o := newOwner(t)
	var ends []*Session
	for _, conns := range [][]transport.Conn{a, b} {
		s, err := NewSession(Config{Conns: conns, Owner: o, Spin: 2 * time.Millisecond, Broken: func(error) {}})
		require.NoError(t, err)
		t.Cleanup(func() { s.Close(errClosed) })
		ends = append(ends, s)
	}
	src, dst := newCache(t, plan.Blocks, 8, 32, 64<<10).randomize(1), newCache(t, plan.Blocks, 8, 32, 64<<10)
	o.offer(1, &offer{cache: src})
	for n := range uint64(30) {
		req := blocks(1, dst, []uint64{n % 32}, []uint64{(n + 7) % 32}) // 512 KiB: over both
		if n%2 == 0 {
			req.Plan.SrcTensors, req.Plan.DstTensors = plan.Range{First: 1, Count: 1}, plan.Range{First: 2, Count: 1}
		}
		want := dst.after(t, req, src)
		require.NoError(t, ends[0].Pull(within(t, settleTime), req, dst.local()))
		dst.requireContent(t, want)
	}
}

func TestConnectionsAreNotPaced(t *testing.T) {
	check(t)
	config := net.ListenConfig{Control: Control}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, listener.Close()) }()
	dialed, err := (&net.Dialer{Control: Control}).Dial("tcp4", listener.Addr().String())
	require.NoError(t, err)
	accepted, err := listener.Accept()
	require.NoError(t, err)
	for _, c := range []net.Conn{dialed, accepted} {
		require.Equal(t, algorithmOf(t, c), loopbackCongestion, "from its first packet on")
		conn, err := NewConn(c)
		require.NoError(t, err)
		require.Contains(t, conn.Path(), loopbackCongestion)
		require.NoError(t, conn.Close())
	}
}

func TestWireKeepsTheSystemsCongestionControl(t *testing.T) {
	check(t)
	system := systemCongestion.Load()
	t.Cleanup(func() { systemCongestion.Store(system) })
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer func() { _ = unix.Close(fd) }()
	other := "reno"
	systemCongestion.Store(&other)
	name, err := chooseCongestion(fd, true)
	require.NoError(t, err)
	require.Contains(t, name, loopbackCongestion)
	name, err = chooseCongestion(fd, false)
	require.NoError(t, err)
	require.Contains(t, name, other)
}

func algorithmOf(t *testing.T, c net.Conn) (name string) {
	raw, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	}))
	require.NoError(t, err)
	return name
}

func TestOwnersReceiversAreParkedWhileMuchIsSent(t *testing.T) {
	check(t)
	a, b := loopbackConns(t, 2)
	o := newOwner(t)
	newSession(t, b, o)
	first, second := newRaw(t, a[0]), newRaw(t, a[1])
	large, small := newCache(t, plan.Contiguous, 1, 1, 2*apartAbove).randomize(1), newCache(t, plan.Contiguous, 1, 1, 1000).randomize(2)
	o.offer(1, &offer{cache: large})
	o.offer(2, &offer{cache: small})
	parked := func() (count int) {
		p := b[0].(*Conn).poller
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.parked)
	}

	first.request(1, flagOneLane, settleTime, rows(1, large))
	second.send(header{kind: kindJoin, operation: 1, a: 2 * apartAbove}, nil)
	first.expect(kindEntry, 1) // what comes next is not read: the owner is in the middle of it
	require.Eventually(t, func() bool { return parked() == 2 }, settleTime, time.Millisecond)
	second.request(2, flagOneLane, settleTime, rows(2, small))
	second.expect(kindEntry, 2)
	_, body := second.expect(kindData, 2)
	require.Equal(t, small.content()[0], body[:1000], "who is parked hears of a request")
	second.send(header{kind: kindJoin, operation: 1, a: 2 * apartAbove}, nil)
	require.Eventually(t, func() bool { return parked() == 2 }, settleTime, time.Millisecond)
	unparked := make(chan struct{})
	go func() {
		defer close(unparked)
		for parked() > 0 {
			runtime.Gosched()
		}
	}()
	var got []byte
	for len(got) < 2*apartAbove {
		h, body := first.expect(kindData, 1)
		got = append(got, body[:h.length]...)
	}
	receiveFrom(t, unparked) // the next request is near
	require.True(t, bytes.Equal(large.content()[0], got))
}
