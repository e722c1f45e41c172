// SPDX-License-Identifier: Apache-2.0

package fabric_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// counts are what the calls on a stream returned.
type counts []int

// sendAll sends memory until all is sent or the stream has ended.
func sendAll(c transport.Conn, m *mem.Buffer) (calls counts, err error) {
	for sent := 0; sent < len(m.Bytes()); {
		n, err := c.Send([]mem.Span{span(m, sent, len(m.Bytes())-sent)})
		if err != nil {
			return calls, err
		}
		if n > 0 { // 0: it has waited for long enough
			calls = append(calls, n)
		}
		sent += n
	}
	return calls, nil
}

// receiveAll receives into memory until it is full or the stream has ended.
func receiveAll(c transport.Conn, m *mem.Buffer) (calls counts, err error) {
	for got := 0; got < len(m.Bytes()); {
		n, err := c.Receive([]mem.Span{span(m, got, len(m.Bytes())-got)})
		if err != nil {
			return calls, err
		}
		if n > 0 {
			calls = append(calls, n)
		}
		got += n
	}
	return calls, nil
}

// exchange sends bytes from a to b and returns what both ends' calls returned.
func exchange(t *testing.T, n *fabric.Network, payload []byte) (sent, received counts) {
	a, b := streams(t, n)
	from, to := memory(t, len(payload)), memory(t, len(payload))
	copy(from.Bytes(), payload)
	sending := start(func() error {
		var err error
		sent, err = sendAll(a, from)
		return err
	})
	received, err := receiveAll(b, to)
	require.NoError(t, err)
	require.NoError(t, sending())
	require.Equal(t, payload, to.Bytes())
	return sent, received
}

func TestTornStreamsAreWholeWithEverySeed(t *testing.T) {
	for seed := range uint64(60) {
		f := fabric.Faults{Tear: 1 + seed*seed*3, Buffer: 1 + seed*97%5000}
		payload := pattern(seed, 4096+int(seed)*331)
		n := newNetwork(t, seed)
		n.SetFaults(f)
		exchange(t, n, payload)
		synctest.Test(t, func(t *testing.T) {
			f.Latency, f.Jitter, f.Loss = time.Millisecond, 5*time.Millisecond, 0.1
			f.BytesPerSecond = 1 << 20 * (seed % 3)
			n := newNetwork(t, seed)
			n.SetFaults(f)
			exchange(t, n, payload)
		})
	}
}

func TestTheSameSeedGivesTheSameShortCounts(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		// All is sent before anything is received: counts then depend on the seed alone.
		oneShot := func(seed uint64) (sent, got counts) {
			n := newNetwork(t, seed)
			n.SetFaults(fabric.Faults{Tear: 700})
			a, b := streams(t, n)
			m := memory(t, 100_000)
			sent, err := sendAll(a, m)
			require.NoError(t, err)
			got, err = receiveAll(b, m)
			require.NoError(t, err)
			return sent, got
		}
		sent, got := oneShot(5)
		require.Greater(t, len(sent), 100)
		require.NotEqual(t, sent, got, "the two ends are torn apart")
		sentAgain, gotAgain := oneShot(5)
		require.Equal(t, sent, sentAgain)
		require.Equal(t, got, gotAgain)
		sentElse, gotElse := oneShot(6)
		require.NotEqual(t, sent, sentElse)
		require.NotEqual(t, got, gotElse)
		n := newNetwork(t, 5)
		n.SetFaults(fabric.Faults{Tear: 700})
		alsoSent, _ := exchange(t, n, pattern(9, 100_000))
		require.Equal(t, sent, alsoSent, "also where the other end takes part meanwhile")
	})
}

func TestCutAfterBytesDeliversThemAndThenResets(t *testing.T) {
	for _, cut := range []uint64{1, 99, 5000} {
		everywhere(t, func(t *testing.T) {
			n := newNetwork(t, 1)
			n.SetFaults(fabric.Faults{CutAfter: cut, Buffer: 700})
			a, b := connected(t, n)
			sent := pattern(1, 10_000)
			writing := start(func() error { _, err := a.Write(sent); return err })
			got, err := received(b)
			require.ErrorIs(t, err, syscall.ECONNRESET)
			require.Equal(t, sent[:cut], got)
			require.ErrorIs(t, writing(), syscall.ECONNRESET)
			_, err = b.Write([]byte("x"))
			require.ErrorIs(t, err, syscall.ECONNRESET)
			_, err = a.Read(make([]byte, 1))
			require.ErrorIs(t, err, syscall.ECONNRESET)
		})
	}
}

func TestCutCountsFromWhenItWasAskedFor(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := connected(t, n)
		write(t, a, "handshake")
		n.SetPairFaults(n.Host("a"), n.Host("b"), fabric.Faults{CutAfter: 4, Latency: time.Millisecond})
		n.SetFaults(fabric.Faults{CutAfter: 1}) // not for this pair
		written, err := a.Write([]byte("transfer"))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.Equal(t, 4, written)
		got, err := received(b)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.Equal(t, "handshaketran", string(got))
	})
}

func TestCutWithinIsDrawnFromTheSeed(t *testing.T) {
	carried := func(seed uint64) int {
		n := newNetwork(t, seed)
		n.SetFaults(fabric.Faults{CutWithin: 50_000})
		a, b := connected(t, n)
		_, err := a.Write(make([]byte, 60_000))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		got, err := received(b)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.LessOrEqual(t, len(got), 50_000)
		return len(got)
	}
	seen := map[int]bool{}
	for seed := range uint64(20) {
		require.Equal(t, carried(seed), carried(seed))
		seen[carried(seed)] = true
	}
	require.Greater(t, len(seen), 15)
}

func TestCutAllResetsConnectionsAndLeavesListeners(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		l := listen(t, n.Host("b"), ":26000")
		for _, cut := range []func(){n.CutAll, func() { n.Cut(n.Host("b"), n.Host("a")) }} {
			a, b := dial(t, n.Host("a"), l)
			write(t, a, "lost")
			cut()
			_, err := b.Read(make([]byte, 1))
			require.ErrorIs(t, err, syscall.ECONNRESET)
			_, err = a.Write([]byte("x"))
			require.ErrorIs(t, err, syscall.ECONNRESET)
		}
	})
}

func TestRefuse(t *testing.T) {
	outcomes := func() (out []bool) {
		n := newNetwork(t, 3)
		l := listen(t, n.Host("b"), ":26000")
		n.SetFaults(fabric.Faults{Refuse: 0.5})
		for range 40 {
			c, err := n.Host("a").Dial(context.Background(), "", l.Addr().String())
			if err != nil {
				require.ErrorIs(t, err, syscall.ECONNREFUSED)
			} else {
				require.NoError(t, c.Close())
			}
			out = append(out, err == nil)
		}
		require.EqualValues(t, 40, n.Stats().Dials)
		return out
	}
	first := outcomes()
	require.Contains(t, first, true)
	require.Contains(t, first, false)
	require.Equal(t, first, outcomes())
}

func TestPartitionHoldsEverythingBackUntilHealed(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		hostA, hostB := n.Host("a"), n.Host("b")
		l := listen(t, hostB, ":26000")
		a, b := dial(t, hostA, l)
		write(t, a, "arrived ")
		n.Partition(hostB, hostA)
		write(t, a, "held back")
		require.NoError(t, a.Close())
		requireRead(t, b, "arrived ")
		require.NoError(t, b.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
		_, err := b.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		_, err = hostA.Dial(ctxFor(t, 20*time.Millisecond), "", l.Addr().String())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		c, other := dial(t, n.Host("c"), l) // others are reached
		write(t, c, "hello")
		requireRead(t, other, "hello")

		require.NoError(t, b.SetReadDeadline(time.Time{}))
		reading := start(func() error {
			got, err := received(b)
			if string(got) != "held back" {
				return fmt.Errorf("got %q", got)
			}
			return err
		})
		n.Heal(hostA, hostB)
		require.Equal(t, io.EOF, reading())
	})
}

func TestDeathBehindAPartitionIsSilent(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		_, b := connected(t, n)
		n.Partition(n.Host("a"), n.Host("b"))
		n.Host("a").Kill()
		require.NoError(t, b.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
		_, err := b.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		write(t, b, "into the void")
		require.NoError(t, b.SetReadDeadline(time.Time{}))
		reading := start(func() error { _, err := b.Read(make([]byte, 1)); return err })
		n.Heal(n.Host("a"), n.Host("b"))
		require.ErrorIs(t, reading(), syscall.ECONNRESET)
	})
}

func TestKillIsSeenByPeersAndAReplacementCanBeReached(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		hostA, hostB := n.Host("a"), n.Host("b")
		l := listen(t, hostB, hostB.IP()+":26000")
		a, b := dial(t, hostA, l)
		write(t, b, "pending bytes are lost")
		reading := start(func() error { _, err := b.Read(make([]byte, 1)); return err })
		accepting := start(func() error { _, err := l.Accept(); return err })
		hostB.Kill()
		hostB.Kill()
		_, err := a.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		_, err = a.Write([]byte("x"))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.ErrorIs(t, reading(), net.ErrClosed)
		require.ErrorIs(t, accepting(), net.ErrClosed)
		_, err = hostB.Listen(":0")
		require.ErrorIs(t, err, net.ErrClosed)
		_, err = hostB.Dial(context.Background(), "", "10.0.0.1:1")
		require.ErrorIs(t, err, net.ErrClosed)
		_, err = hostA.Dial(context.Background(), "", l.Addr().String())
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.Equal(t, 1, n.Stats().Open, "the dead hold nothing")

		replacement := n.Host("b")
		require.NotSame(t, hostB, replacement)
		require.Equal(t, hostB.IP(), replacement.IP())
		a, b = dial(t, hostA, listen(t, replacement, hostB.IP()+":26000"))
		write(t, a, "again")
		requireRead(t, b, "again")
	})
}

func TestKillAfterBytesDeliversThemAndThenResets(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		hostA := n.Host("a")
		l := listen(t, n.Host("b"), ":26000")
		one, atB1 := dial(t, hostA, l)
		two, atB2 := dial(t, hostA, l)
		hostA.KillAfter(7)
		write(t, one, "abcd")
		written, err := two.Write([]byte("efghij"))
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, 3, written)
		got, err := received(atB1)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.Equal(t, "abcd", string(got))
		got, err = received(atB2)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.Equal(t, "efg", string(got))
	})
	drawn := fabric.New(8).Host("x").KillWithin(1 << 40)
	require.Equal(t, drawn, fabric.New(8).Host("x").KillWithin(1<<40))
	require.NotEqual(t, drawn, fabric.New(9).Host("x").KillWithin(1<<40))
}

func TestPausedHostNeitherReceivesNorSends(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 10})
		hostA, hostB := n.Host("a"), n.Host("b")
		l := listen(t, hostB, ":26000")
		a, b := dial(t, hostA, l)
		s := stream(t, hostB, b)
		hostB.Pause()
		write(t, a, "0123456789") // its kernel goes on receiving until its buffer is full
		require.NoError(t, a.SetWriteDeadline(time.Now().Add(20*time.Millisecond)))
		_, err := a.Write([]byte("x"))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		m := memory(t, 100)
		for _, call := range []func([]mem.Span) (int, error){s.Receive, s.Send} {
			n, err := call([]mem.Span{span(m, 0, 100)})
			require.NoError(t, err)
			require.Zero(t, n)
		}
		second, err := hostA.Dial(context.Background(), "", l.Addr().String())
		require.NoError(t, err, "its kernel goes on accepting")
		require.NoError(t, second.Close())
		_, err = hostB.Dial(ctxFor(t, 20*time.Millisecond), "", l.Addr().String())
		require.ErrorIs(t, err, context.DeadlineExceeded)

		accepting := start(func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			return c.Close()
		})
		parked := start(func() struct{} { s.Park(); return struct{}{} })
		hostB.Resume()
		parked()
		require.NoError(t, accepting())
		got, err := s.Receive([]mem.Span{span(m, 0, 100)})
		require.NoError(t, err)
		require.Equal(t, "0123456789", string(m.Bytes()[:got]))
	})
}

func TestLatencyCostsNoWallTime(t *testing.T) {
	wall := time.Now()
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Latency: 10 * time.Second})
		began := time.Now()
		a, b := connected(t, n)
		require.Equal(t, 20*time.Second, time.Since(began), "a dial goes there and back")
		began = time.Now()
		write(t, a, "x")
		require.Zero(t, time.Since(began))
		require.NoError(t, a.Close())
		requireRead(t, b, "x")
		require.Equal(t, 10*time.Second, time.Since(began))
		_, err := b.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		require.Equal(t, 10*time.Second, time.Since(began))
	})
	require.Less(t, time.Since(wall), 10*time.Second)
}

func TestDeadlinesAndWaitsAreExactUnderVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		l := listen(t, n.Host("b"), ":26000")
		a, _ := dial(t, n.Host("a"), l)
		began := time.Now()
		require.NoError(t, a.SetReadDeadline(began.Add(time.Hour)))
		_, err := a.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, time.Hour, time.Since(began))
		s := stream(t, n.Host("a"), a)
		m := memory(t, 8)
		began = time.Now()
		for range 10 {
			_, err = s.Receive([]mem.Span{span(m, 0, 8)})
			require.NoError(t, err)
		}
		require.Equal(t, 10*maxWait, time.Since(began))
		n.Partition(n.Host("a"), n.Host("b"))
		began = time.Now()
		_, err = n.Host("a").Dial(ctxFor(t, time.Minute), "", l.Addr().String())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(began))
	})
}

func TestBytesPerSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{BytesPerSecond: 1 << 20})
		began := time.Now()
		exchange(t, n, pattern(1, 8<<20))
		require.InDelta(t, 8, time.Since(began).Seconds(), 0.01)
	})
}

func TestJitterReordersConnectionsAndNeverAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Latency: time.Second, Jitter: time.Second})
		l := listen(t, n.Host("b"), ":26000")
		const lanes = 8
		var mu sync.Mutex
		var order []int
		var readers sync.WaitGroup
		var writers []net.Conn
		for lane := range lanes {
			a, b := dial(t, n.Host("a"), l)
			writers = append(writers, a)
			readers.Go(func() {
				got := make([]byte, 3)
				_, err := io.ReadFull(b, got)
				mu.Lock()
				defer mu.Unlock()
				if err == nil && string(got) == "abc" {
					order = append(order, lane)
				}
			})
		}
		began := time.Now()
		for _, w := range writers {
			for _, letter := range []string{"a", "b", "c"} {
				write(t, w, letter)
			}
		}
		readers.Wait()
		require.Len(t, order, lanes, "each stream is in order")
		require.NotEqual(t, []int{0, 1, 2, 3, 4, 5, 6, 7}, order, "the lanes are not")
		require.Less(t, time.Since(began), 2*time.Second)
	})
}

func TestLossDelaysAndLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Loss: 1})
		a, b := connected(t, n)
		began := time.Now()
		write(t, a, "x")
		requireRead(t, b, "x")
		require.Equal(t, 200*time.Millisecond, time.Since(began))
	})
}

func TestReadDirect(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := n.Host("a"), n.Host("b")
		n.SetFaults(fabric.Faults{Latency: 5 * time.Millisecond, BytesPerSecond: 1 << 40})
		const size = 3<<20 + 7
		from, to := memory(t, size), memory(t, size)
		copy(from.Bytes(), pattern(1, size))
		whole := []mem.Move{{Dst: to.Addr(), Src: from.Addr(), Bytes: 5}, {Dst: to.Addr() + 5, Src: from.Addr() + 5, Bytes: size - 5}}
		began := time.Now()
		b.Pause() // its memory can be read all the same
		require.NoError(t, a.ReadDirect(b, whole))
		b.Resume()
		require.GreaterOrEqual(t, time.Since(began), 10*time.Millisecond)
		require.Equal(t, from.Bytes(), to.Bytes())

		b.FaultSpans(func(s mem.Span) bool { return s.Addr == from.Addr()+5 })
		clear(to.Bytes())
		require.ErrorIs(t, a.ReadDirect(b, whole), syscall.EFAULT)
		require.Equal(t, from.Bytes()[:5], to.Bytes()[:5])
		require.Equal(t, make([]byte, size-5), to.Bytes()[5:])
		b.FaultSpans(nil)

		n.Partition(a, b)
		require.ErrorIs(t, a.ReadDirect(b, whole), syscall.EHOSTUNREACH)
		n.Heal(a, b)
		n.SetFaults(fabric.Faults{Latency: time.Hour})
		reading := start(func() error { return a.ReadDirect(b, whole) })
		b.Kill()
		require.ErrorIs(t, reading(), syscall.ESRCH)
		require.Error(t, a.ReadDirect(fabric.New(1).Host("c"), whole))
		a.Kill()
		require.ErrorIs(t, a.ReadDirect(b, whole), net.ErrClosed)
	})
}

// TestEveryCallEndsWhateverHappens does everything at once, by seed: each stream gets a prefix of what was sent, and nothing hangs.
func TestEveryCallEndsWhateverHappens(t *testing.T) {
	for seed := range uint64(12) {
		everywhere(t, func(t *testing.T) { mayhem(t, seed) })
	}
}

func mayhem(t *testing.T, seed uint64) {
	n := newNetwork(t, seed)
	n.SetFaults(fabric.Faults{Latency: 50 * time.Microsecond, Jitter: 100 * time.Microsecond, Tear: 5000, Buffer: 20_000})
	a, b := n.Host("a"), n.Host("b")
	l := listen(t, b, ":26000")
	payload := pattern(seed, 300_000)
	var streamsDone sync.WaitGroup
	failures := make(chan error, 16)
	for range 4 {
		atA, atB := dial(t, a, l)
		sender, receiver := stream(t, a, atA), stream(t, b, atB)
		from, to := memory(t, len(payload)), memory(t, len(payload))
		copy(from.Bytes(), payload)
		streamsDone.Go(func() {
			_, err := sendAll(sender, from)
			sender.Shutdown()
			failures <- err
		})
		streamsDone.Go(func() {
			got, err := receiveAll(receiver, to)
			sum := 0
			for _, n := range got {
				sum += n
			}
			if string(to.Bytes()[:sum]) != string(payload[:sum]) {
				err = errors.New("not what was sent")
			}
			receiver.Shutdown()
			failures <- err
		})
	}
	r := rand.New(rand.NewPCG(seed, 2))
	trouble := []func(){
		func() { n.Partition(a, b) }, func() { n.Heal(a, b) }, a.Pause, a.Resume, b.Pause, b.Resume,
		func() { n.SetFaults(fabric.Faults{Tear: 1 + r.Uint64N(9000), Buffer: 1 + r.Uint64N(50_000)}) },
		func() { n.SetFaults(fabric.Faults{CutWithin: 1 << 20, Latency: time.Millisecond}) },
	}
	for range 30 {
		trouble[r.IntN(len(trouble))]()
		<-time.After(time.Duration(r.IntN(300)) * time.Microsecond)
	}
	switch r.IntN(4) {
	case 0:
		a.Kill()
	case 1:
		b.KillAfter(1) // it sends nothing: it lives
	case 2:
		n.CutAll()
	}
	n.Heal(a, b)
	a.Resume()
	b.Resume()
	streamsDone.Wait()
	close(failures)
	for err := range failures {
		if err != nil && err != io.EOF {
			require.Truef(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), "%v", err)
		}
	}
}
