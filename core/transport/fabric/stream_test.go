// SPDX-License-Identifier: Apache-2.0

package fabric_test

import (
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

const maxWait = transport.MaxWaitMillis * time.Millisecond

func TestStreamGathersAndScatters(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		a, b := streams(t, newNetwork(t, 1))
		from, to := memory(t, 4096), memory(t, 4096)
		copy(from.Bytes(), "header....body")
		n, err := a.Send([]mem.Span{span(from, 0, 6), span(from, 6, 0), span(from, 10, 4)})
		require.NoError(t, err)
		require.Equal(t, 10, n)
		copy(from.Bytes(), "overwritten...") // the bytes have left the caller's memory
		n, err = b.Receive([]mem.Span{span(to, 100, 3), span(to, 200, 4096-200)})
		require.NoError(t, err)
		require.Equal(t, 10, n)
		require.Equal(t, "hea", string(to.Bytes()[100:103]))
		require.Equal(t, "derbody", string(to.Bytes()[200:207]))
	})
}

func TestStreamWaitsNoLongerThanItSays(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 10})
		a, _ := streams(t, n)
		m := memory(t, 100)
		all := []mem.Span{span(m, 0, 100)}
		took := func(want int, call func([]mem.Span) (int, error)) time.Duration {
			began := time.Now()
			n, err := call(all)
			require.NoError(t, err)
			require.Equal(t, want, n)
			return time.Since(began)
		}
		require.GreaterOrEqual(t, took(0, a.Receive), maxWait)
		require.Less(t, took(0, a.TryReceive), maxWait)
		require.Less(t, took(10, a.TrySend), maxWait)
		require.GreaterOrEqual(t, took(0, a.Send), maxWait)
		require.Less(t, took(0, a.TrySend), maxWait)
		for _, call := range []func([]mem.Span) (int, error){a.Receive, a.Send} {
			n, err := call(nil)
			require.NoError(t, err)
			require.Zero(t, n)
		}
	})
}

func TestStreamTakesOverWhatWasNotReadYet(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := connected(t, n)
		write(t, a, "hello and the first frame")
		requireRead(t, b, "hello ")
		waiting := start(func() error {
			for { // until it is taken over, there is something to read
				if _, err := b.Read(make([]byte, 1)); err != nil {
					return err
				}
			}
		})
		s := stream(t, n.Host("b"), b)
		require.ErrorIs(t, waiting(), net.ErrClosed)
		require.NoError(t, b.Close(), "closing what was taken over does nothing")
		_, err := n.Host("b").Data(b)
		require.ErrorIs(t, err, net.ErrClosed)
		write(t, a, ".")
		m := memory(t, 100)
		got, err := s.Receive([]mem.Span{span(m, 0, 100)})
		require.NoError(t, err)
		require.Equal(t, byte('.'), m.Bytes()[got-1])
		require.Equal(t, b.LocalAddr().String()+" -> "+b.RemoteAddr().String()+", fabric", s.Path())
	})
}

func TestDataRefusesAndClosesWhatIsNotTheHosts(t *testing.T) {
	n := newNetwork(t, 1)
	a, b := connected(t, n)
	_, err := n.Host("b").Data(a)
	require.Error(t, err)
	require.ErrorIs(t, a.Close(), net.ErrClosed)
	require.NoError(t, b.Close())
	_, err = n.Host("b").Data(b)
	require.ErrorIs(t, err, net.ErrClosed)
	one, two := net.Pipe()
	defer two.Close()
	_, err = n.Host("b").Data(one)
	require.Error(t, err)
}

func TestStreamEndsWithEOFAndEPIPE(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		a, b := streams(t, newNetwork(t, 1))
		m := memory(t, 100)
		all := []mem.Span{span(m, 0, 100)}
		_, err := a.Send(all)
		require.NoError(t, err)
		require.NoError(t, a.Close())
		n, err := b.Receive(all)
		require.NoError(t, err)
		require.Equal(t, 100, n)
		for range 2 {
			_, err = b.Receive(all)
			require.Equal(t, io.EOF, err)
			_, err = b.Send(all)
			require.ErrorIs(t, err, syscall.EPIPE)
		}
		b.Park()
	})
}

func TestShutdownMakesEveryCallReturn(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 100})
		a, b := streams(t, n)
		m := memory(t, 100)
		all := []mem.Span{span(m, 0, 100)}
		_, err := a.Send(all) // the next one waits
		require.NoError(t, err)
		parked := start(func() struct{} { a.Park(); return struct{}{} })
		sending := start(func() error { _, err := a.Send(all); return err })
		a.Shutdown()
		a.Shutdown()
		parked()
		if err := sending(); err != nil { // nil: its 100 ms were over before
			require.ErrorIs(t, err, syscall.EPIPE)
		}
		_, err = a.TryReceive(all)
		require.Equal(t, io.EOF, err)
		_, err = a.TrySend(all)
		require.ErrorIs(t, err, syscall.EPIPE)
		a.Park()

		got, err := b.Receive(all)
		require.NoError(t, err)
		require.Equal(t, 100, got, "what was sent before arrives")
		_, err = b.Receive(all)
		require.Equal(t, io.EOF, err)
		require.Equal(t, 2, n.Stats().Open, "shut down is not closed")
		require.NoError(t, a.Close())
		require.NoError(t, a.Close())
		a.Shutdown()
	})
}

func TestParkWaitsForBytesAndForNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Latency: time.Hour})
		a, b := streams(t, n)
		m := memory(t, 100)
		began := time.Now()
		parked := false
		returned := start(func() time.Duration { b.Park(); parked = true; return time.Since(began) })
		synctest.Wait()
		require.False(t, parked)
		_, err := a.Send([]mem.Span{span(m, 0, 1)})
		require.NoError(t, err)
		require.Equal(t, time.Hour, returned())
		got, err := b.TryReceive([]mem.Span{span(m, 0, 100)})
		require.NoError(t, err)
		require.Equal(t, 1, got)
	})
}

func TestFaultedSpanIsEFAULTAndLosesNothing(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := streams(t, n)
		from, to := memory(t, 4096), memory(t, 4096)
		copy(from.Bytes(), "abcdefghij")
		bad := span(from, 4, 3)
		n.Host("a").FaultSpans(func(s mem.Span) bool { return s.Addr == bad.Addr })
		spans := []mem.Span{span(from, 0, 4), bad, span(from, 7, 3)}
		sent, err := a.Send(spans)
		require.NoError(t, err)
		require.Equal(t, 4, sent)
		sent, err = a.Send(spans[1:])
		require.ErrorIs(t, err, syscall.EFAULT)
		require.Zero(t, sent)
		sent, err = a.Send(spans[2:])
		require.NoError(t, err)
		require.Equal(t, 3, sent)

		hole := span(to, 2, 2)
		n.Host("b").FaultSpans(func(s mem.Span) bool { return s.Addr == hole.Addr })
		got, err := b.Receive([]mem.Span{span(to, 0, 2), hole, span(to, 10, 100)})
		require.NoError(t, err)
		require.Equal(t, 2, got)
		_, err = b.Receive([]mem.Span{hole, span(to, 10, 100)})
		require.ErrorIs(t, err, syscall.EFAULT)
		got, err = b.Receive([]mem.Span{span(to, 10, 100)})
		require.NoError(t, err)
		require.Equal(t, 5, got)
		require.Equal(t, "ab", string(to.Bytes()[:2]))
		require.Equal(t, "cdhij", string(to.Bytes()[10:15]))

		got, err = b.TryReceive([]mem.Span{hole})
		require.NoError(t, err, "nothing to receive comes before EFAULT, as in the system")
		require.Zero(t, got)
		n.Host("b").FaultSpans(nil)
		require.NoError(t, a.Close())
		_, err = b.Receive([]mem.Span{hole})
		require.Equal(t, io.EOF, err)
	})
}
