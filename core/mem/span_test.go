// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func socketPair(t testing.TB) (a, b int) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _, _ = unix.Close(pair[0]), unix.Close(pair[1]) })
	return pair[0], pair[1]
}

func TestSpansAreGatheredAndScatteredInOrder(t *testing.T) {
	a, b := socketPair(t)
	from, to := pages(t, 1), pages(t, 1)
	copy(from.Bytes(), "abcdefghij")
	n, err := SendSpans(a, []Span{{from.Addr() + 5, 5}, {from.Addr(), 0}, {from.Addr(), 5}}, 0)
	require.NoError(t, err)
	require.Equal(t, 10, n)
	n, err = ReceiveSpans(b, []Span{{to.Addr() + 100, 3}, {to.Addr(), 7}}, 0)
	require.NoError(t, err)
	require.Equal(t, 10, n)
	require.Equal(t, "fgh", string(to.Bytes()[100:103]))
	require.Equal(t, "ijabcde", string(to.Bytes()[:7]))
}

func TestSpansBeyondTheKernelsLimitAreLeftForTheNextCall(t *testing.T) {
	a, b := socketPair(t)
	buffer := pages(t, 2)
	spans := make([]Span, MaxSpans+10)
	for i := range spans {
		spans[i] = Span{buffer.Addr() + uintptr(i), 1}
	}
	n, err := SendSpans(a, spans, 0)
	require.NoError(t, err)
	require.Equal(t, MaxSpans, n)
	n, err = SendSpans(a, spans[n:], 0)
	require.NoError(t, err)
	require.Equal(t, 10, n)
	n, err = ReceiveSpans(b, spans, 0)
	require.NoError(t, err)
	require.Equal(t, MaxSpans, n)
}

func TestSpanFailuresAreBareErrnos(t *testing.T) {
	a, b := socketPair(t)
	buffer := pages(t, 2)
	hole(t, buffer, 1)
	good := Span{buffer.Addr(), page}
	bad := Span{buffer.Addr() + uintptr(page), page}

	_, err := ReceiveSpans(b, []Span{good}, unix.MSG_DONTWAIT)
	require.Equal(t, unix.EAGAIN, err)
	_, err = SendSpans(a, []Span{bad}, 0)
	require.Equal(t, unix.EFAULT, err)
	_, err = SendSpans(a, []Span{{1, 8}}, 0)
	require.Equal(t, unix.EFAULT, err)

	for _, fill := range []byte{1, 2} { // two messages, each page.Bytes long
		copy(buffer.Bytes()[:page], bytes.Repeat([]byte{fill}, int(page)))
		n, err := SendSpans(a, []Span{good}, 0)
		require.NoError(t, err)
		require.EqualValues(t, page, n)
	}
	n, err := ReceiveSpans(b, []Span{good, bad}, 0)
	require.NoError(t, err, "what came before the fault is returned without it")
	require.EqualValues(t, page, n)
	require.Equal(t, byte(1), buffer.Bytes()[page-1])
	_, err = ReceiveSpans(b, []Span{bad}, 0)
	require.Equal(t, unix.EFAULT, err)
	n, err = ReceiveSpans(b, []Span{good}, 0)
	require.NoError(t, err, "the stream is whole after a fault")
	require.EqualValues(t, page, n)
	require.Equal(t, byte(2), buffer.Bytes()[page-1])

	require.NoError(t, unix.Shutdown(a, unix.SHUT_RDWR))
	n, err = ReceiveSpans(b, []Span{good}, 0)
	require.NoError(t, err)
	require.Zero(t, n, "the end of the stream")
	_, err = SendSpans(b, []Span{good}, 0)
	require.Equal(t, unix.EPIPE, err)
}

func TestNoSpansAreNoSystemCall(t *testing.T) {
	n, err := ReceiveSpans(-1, nil, 0)
	require.NoError(t, err)
	require.Zero(t, n)
	n, err = SendSpans(-1, nil, 0)
	require.NoError(t, err)
	require.Zero(t, n)
}

func TestSpanCallsAllocateNothing(t *testing.T) {
	a, b := socketPair(t)
	buffer := pages(t, 1)
	spans := []Span{{buffer.Addr(), 100}, {buffer.Addr() + 200, 100}}
	require.Zero(t, testing.AllocsPerRun(100, func() {
		_, _ = SendSpans(a, spans, 0)
		_, _ = ReceiveSpans(b, spans, 0)
		_, _ = ReceiveSpans(b, spans, unix.MSG_DONTWAIT)
	}))
}
