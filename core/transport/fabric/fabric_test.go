// SPDX-License-Identifier: Apache-2.0

package fabric_test

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// everywhere runs a check in real time and under virtual time. In a bubble it also shows that no goroutine is left.
func everywhere(t *testing.T, check func(t *testing.T)) {
	t.Helper()
	t.Run("real time", check)
	t.Run("virtual time", func(t *testing.T) { synctest.Test(t, check) })
}

// newNetwork makes a network, and checks at the end of the test that everything was closed.
func newNetwork(t *testing.T, seed uint64) *fabric.Network {
	n := fabric.New(seed)
	t.Cleanup(func() {
		s := n.Stats()
		require.Zero(t, s.Open, "connections left open")
		require.Zero(t, s.Listeners, "listeners left open")
		require.Zero(t, s.Proofs, "doors or witnesses left open")
		n.Close()
	})
	return n
}

func listen(t *testing.T, h *fabric.Host, address string) net.Listener {
	if address[0] == ':' {
		address = h.IP() + address
	}
	l, err := h.Listen(address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, h *fabric.Host, l net.Listener) (dialed, accepted net.Conn) {
	dialed, err := h.Dial(context.Background(), "", l.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = dialed.Close() })
	accepted, err = l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = accepted.Close() })
	return dialed, accepted
}

// connected makes two hosts, a and b, and a connection that a has dialed.
func connected(t *testing.T, n *fabric.Network) (atA, atB net.Conn) {
	return dial(t, n.Host("a"), listen(t, n.Host("b"), ":0"))
}

func stream(t *testing.T, h *fabric.Host, c net.Conn) transport.Conn {
	s, err := h.Data(c)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// streams is connected, taken over at both ends.
func streams(t *testing.T, n *fabric.Network) (atA, atB transport.Conn) {
	a, b := connected(t, n)
	return stream(t, n.Host("a"), a), stream(t, n.Host("b"), b)
}

// memory is some that an engine might have registered.
func memory(t *testing.T, bytes int) *mem.Buffer {
	b, err := mem.NewBuffer(bytes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Free()) })
	return b
}

func span(b *mem.Buffer, from, bytes int) mem.Span {
	return mem.Span{Addr: b.Addr() + uintptr(from), Bytes: uint64(bytes)}
}

// pattern is a run of bytes in which each place can be told from its neighbours.
func pattern(seed uint64, bytes int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	out := make([]byte, bytes)
	for i := range out {
		out[i] = byte(r.Uint32())
	}
	return out
}

// start runs f beside the test; the function that it returns waits for it.
func start[T any](f func() T) (wait func() T) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	return func() T { return <-done }
}

// received reads until an error and returns everything before it.
func received(c net.Conn) (got []byte, err error) {
	b := make([]byte, 1000)
	for {
		n, err := c.Read(b)
		got = append(got, b[:n]...)
		if err != nil {
			return got, err
		}
	}
}

func write(t *testing.T, c net.Conn, text string) {
	n, err := io.WriteString(c, text)
	require.NoError(t, err)
	require.Equal(t, len(text), n)
}

func requireRead(t *testing.T, c net.Conn, text string) {
	b := make([]byte, len(text))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, text, string(b))
}

func ctxFor(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
