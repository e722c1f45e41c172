// SPDX-License-Identifier: Apache-2.0

package fabric_test

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

func TestConnCarriesBytesBothWays(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		a, b := connected(t, newNetwork(t, 1))
		write(t, a, "there")
		requireRead(t, b, "there")
		write(t, b, "and back")
		requireRead(t, a, "and back")
		n, err := a.Read(nil)
		require.NoError(t, err)
		require.Zero(t, n)
		n, err = a.Write(nil)
		require.NoError(t, err)
		require.Zero(t, n)
	})
}

func TestConnAddresses(t *testing.T) {
	n := newNetwork(t, 1)
	a, b := connected(t, n)
	require.Equal(t, a.LocalAddr().String(), b.RemoteAddr().String())
	require.Equal(t, b.LocalAddr().String(), a.RemoteAddr().String())
	ip, _, err := net.SplitHostPort(a.LocalAddr().String())
	require.NoError(t, err)
	require.Equal(t, n.Host("a").IP(), ip)
	require.Equal(t, "a", n.Host("a").Name())
	require.Equal(t, "192.168.7.9", n.Host("192.168.7.9").IP())
}

func TestReadAfterCloseOfThePeerGivesWhatWasSentAndThenEOF(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		a, b := connected(t, newNetwork(t, 1))
		write(t, a, "last words")
		require.NoError(t, a.Close())
		got, err := received(b)
		require.Equal(t, io.EOF, err)
		require.Equal(t, "last words", string(got))
		_, err = b.Write([]byte("too late"))
		require.ErrorIs(t, err, syscall.EPIPE)
		require.ErrorIs(t, a.Close(), net.ErrClosed)
		require.ErrorIs(t, a.SetDeadline(time.Time{}), net.ErrClosed)
	})
}

func TestCloseWriteLeavesTheOtherDirection(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		a, b := connected(t, newNetwork(t, 1))
		write(t, a, "question")
		require.NoError(t, a.(interface{ CloseWrite() error }).CloseWrite())
		_, err := a.Write([]byte("more"))
		require.ErrorIs(t, err, syscall.EPIPE)
		got, err := received(b)
		require.Equal(t, io.EOF, err)
		require.Equal(t, "question", string(got))
		write(t, b, "answer")
		requireRead(t, a, "answer")
	})
}

func TestCloseEndsCallsThatWait(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 10})
		a, _ := connected(t, n)
		reading := start(func() error { _, err := a.Read(make([]byte, 1)); return err })
		writing := start(func() error { _, err := a.Write(make([]byte, 100)); return err })
		require.NoError(t, a.Close())
		require.ErrorIs(t, reading(), net.ErrClosed)
		require.ErrorIs(t, writing(), net.ErrClosed)
	})
}

func TestDeadlines(t *testing.T) {
	const soon = 20 * time.Millisecond
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 10})
		a, b := connected(t, n)
		one := make([]byte, 1)

		began := time.Now()
		require.NoError(t, a.SetReadDeadline(began.Add(soon)))
		_, err := a.Read(one)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		var timeout net.Error
		require.ErrorAs(t, err, &timeout)
		require.True(t, timeout.Timeout())
		require.GreaterOrEqual(t, time.Since(began), soon)

		write(t, b, "x")
		_, err = a.Read(one)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded, "a deadline that has passed ends later calls too")
		require.NoError(t, a.SetReadDeadline(time.Time{}))
		requireRead(t, a, "x")

		require.NoError(t, a.SetWriteDeadline(time.Now().Add(soon)))
		written, err := a.Write(make([]byte, 100))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, 10, written)

		waiting := start(func() error { _, err := a.Read(one); return err })
		require.NoError(t, a.SetDeadline(time.Now().Add(-time.Second)))
		require.ErrorIs(t, waiting(), os.ErrDeadlineExceeded, "a new deadline reaches a call that waits")
	})
}

func TestWriteWaitsUntilThereIsRoom(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 1000})
		a, b := connected(t, n)
		sent := pattern(1, 10_000)
		writing := start(func() error {
			defer a.Close()
			_, err := a.Write(sent)
			return err
		})
		got, err := received(b)
		require.Equal(t, io.EOF, err)
		require.NoError(t, writing())
		require.Equal(t, sent, got)
	})
}

func TestTheDefaultBufferHolds256KiB(t *testing.T) {
	a, b := streams(t, newNetwork(t, 1))
	from, to := memory(t, 1<<20), memory(t, 1<<20)
	copy(from.Bytes(), pattern(1, 1<<20))
	n, err := a.TrySend([]mem.Span{span(from, 0, 1<<20)})
	require.NoError(t, err)
	require.Equal(t, 256<<10, n)
	n, err = b.TryReceive([]mem.Span{span(to, 0, 1<<20)})
	require.NoError(t, err)
	require.Equal(t, from.Bytes()[:n], to.Bytes()[:n])
	require.Equal(t, 256<<10, n)
}

func TestAWriteBehindAnotherEndsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 10})
		a, _ := connected(t, n)
		write := func() error { _, err := a.Write(make([]byte, 100)); return err }
		one, two := start(write), start(write)
		synctest.Wait()
		require.NoError(t, a.SetWriteDeadline(time.Now().Add(time.Minute)))
		require.ErrorIs(t, one(), os.ErrDeadlineExceeded)
		require.ErrorIs(t, two(), os.ErrDeadlineExceeded)
		require.NoError(t, a.SetWriteDeadline(time.Time{}))
		one, two = start(write), start(write)
		synctest.Wait()
		require.NoError(t, a.Close())
		require.ErrorIs(t, one(), net.ErrClosed)
		require.ErrorIs(t, two(), net.ErrClosed)
	})
}

func TestWritesOfTwoGoroutinesAreNotMixed(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		n.SetFaults(fabric.Faults{Buffer: 7, Tear: 3})
		a, b := connected(t, n)
		hellos, worlds := strings.Repeat("h", 100), strings.Repeat("w", 100)
		one := start(func() error { _, err := io.WriteString(a, hellos); return err })
		two := start(func() error { _, err := io.WriteString(a, worlds); return err })
		got := make([]byte, 200)
		_, err := io.ReadFull(b, got)
		require.NoError(t, err)
		require.NoError(t, one())
		require.NoError(t, two())
		require.Contains(t, []string{hellos + worlds, worlds + hellos}, string(got))
	})
}

func TestListen(t *testing.T) {
	n := newNetwork(t, 1)
	h := n.Host("h")
	l := listen(t, h, h.IP()+":26000")
	require.Equal(t, h.IP()+":26000", l.Addr().String())
	cases := []struct {
		address string
		err     error
	}{
		{h.IP() + ":26000", syscall.EADDRINUSE},
		{":26000", syscall.EADDRINUSE},
		{"10.9.9.9:26000", syscall.EADDRNOTAVAIL},
	}
	for _, c := range cases {
		_, err := h.Listen(c.address)
		require.ErrorIs(t, err, c.err, c.address)
	}
	for _, address := range []string{"", "x", "host:1", "1.2.3.4:99999", "1.2.3.4"} {
		_, err := h.Listen(address)
		require.Error(t, err, address)
	}
	one, two := listen(t, h, ":0"), listen(t, h, h.IP()+":0")
	require.NotEqual(t, one.Addr().(*net.TCPAddr).Port, two.Addr().(*net.TCPAddr).Port)
	require.NoError(t, l.Close())
	require.ErrorIs(t, l.Close(), net.ErrClosed)
	require.NoError(t, listen(t, h, ":26000").Close(), "a closed listener's port is free")
}

func TestDial(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := n.Host("a"), n.Host("b")
		l := listen(t, b, b.IP()+":26000")
		private := listen(t, b, "127.0.0.1:26001")
		cases := []struct {
			name            string
			from            *fabric.Host
			source, address string
			err             error
		}{
			{"nobody listens", a, "", b.IP() + ":1", syscall.ECONNREFUSED},
			{"nobody lives there", a, "", "10.9.9.9:26000", syscall.ECONNREFUSED},
			{"only for the host itself", a, "", b.IP() + ":26001", syscall.ECONNREFUSED},
			{"the loopback of another host", a, "", "127.0.0.1:26001", syscall.ECONNREFUSED},
			{"not one's own address", a, b.IP(), b.IP() + ":26000", syscall.EADDRNOTAVAIL},
		}
		for _, c := range cases {
			_, err := c.from.Dial(context.Background(), c.source, c.address)
			require.ErrorIs(t, err, c.err, c.name)
		}
		_, err := a.Dial(context.Background(), "", "nonsense")
		require.Error(t, err)

		c, err := a.Dial(context.Background(), a.IP()+":777", l.Addr().String())
		require.NoError(t, err)
		require.Equal(t, a.IP()+":777", c.LocalAddr().String())
		require.NoError(t, c.Close())
		c, err = b.Dial(context.Background(), "", private.Addr().String())
		require.NoError(t, err)
		require.NoError(t, c.Close())

		done, cancel := context.WithCancel(context.Background())
		cancel()
		_, err = a.Dial(done, "", l.Addr().String())
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestClosingAListenerEndsAcceptAndResetsWhoWasNotAccepted(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		l := listen(t, n.Host("b"), ":26000")
		c, err := n.Host("a").Dial(context.Background(), "", n.Host("b").IP()+":26000")
		require.NoError(t, err)
		require.NoError(t, l.Close())
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		require.NoError(t, c.Close())

		l = listen(t, n.Host("b"), ":26000")
		accepting := start(func() error { _, err := l.Accept(); return err })
		require.NoError(t, l.Close())
		require.ErrorIs(t, accepting(), net.ErrClosed)
	})
}

func TestNetworkCloseEndsEveryCall(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := fabric.New(1)
		a, b := n.Host("a"), n.Host("b")
		l := listen(t, b, ":26000")
		atA, _ := dial(t, a, l)
		atA2, _ := dial(t, a, l)
		s := stream(t, a, atA2)
		n.Partition(a, b)
		reading := start(func() error { _, err := atA.Read(make([]byte, 1)); return err })
		accepting := start(func() error { _, err := l.Accept(); return err })
		dialing := start(func() error {
			_, err := a.Dial(context.Background(), "", b.IP()+":26000")
			return err
		})
		parked := start(func() struct{} { s.Park(); return struct{}{} })
		n.Close()
		n.Close()
		require.ErrorIs(t, reading(), net.ErrClosed)
		require.ErrorIs(t, accepting(), net.ErrClosed)
		require.ErrorIs(t, dialing(), net.ErrClosed)
		parked()
		_, err := a.Listen(":0")
		require.ErrorIs(t, err, net.ErrClosed)
		require.Equal(t, 4, n.Stats().Open, "what nobody has closed still counts")
	})
}
