// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func (n *node) raw() net.Conn {
	c, err := net.Dial("tcp", n.address)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestOtherMajorVersionIsRefusedOnBothEnds(t *testing.T) {
	check(t)
	b := newNode(t, 2)
	c := b.raw()
	p := ourPreamble(intentControl)
	p.major = 9
	_, err := c.Write(appendBlock(p.append(nil), map[string]string{"who": "knows"}))
	require.NoError(t, err)
	answer, err := readAnswer(Descriptors{}.own(c), intentControl)
	require.Equal(t, major, answer.major)
	require.ErrorContains(t, err, "peer speaks version 9.0")
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return b.saw("peer speaks version 9.0") }, patient, time.Millisecond)

	// And as seen by the end that dials.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = readPreamble(c)
		_, _ = c.Write(p.append(nil))
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}()
	_, err = b.dialTo(l.Addr().String())
	require.ErrorIs(t, err, status.LinkFailed)
	require.ErrorContains(t, err, "version 9.0")
	require.True(t, b.saw("can not link with "+l.Addr().String()))
	<-done
}

func TestStrangersAreTurnedAway(t *testing.T) {
	check(t)
	for name, bytes := range map[string][]byte{
		"http":          []byte("GET / HTTP/1.1\r\nHost: me\r\n\r\n"),
		"one byte":      {0},
		"random":        {0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22},
		"large hello":   append(ourPreamble(intentControl).append(nil), 0xff, 0xff, 0xff, 0xff),
		"no hello":      append(ourPreamble(intentControl).append(nil), 2, 0, 0, 0, 0xff, 0xff),
		"other intent":  ourPreamble(77).append(nil),
		"nested":        append(append(ourPreamble(intentControl).append(nil), 40, 0, 0, 0), repeated(0x81, 40)...),
		"no such nonce": appendBlock(ourPreamble(intentData).append(nil), hello{Incarnation: make([]byte, 16), Nonce: make([]byte, 16)}),
	} {
		t.Run(name, func(t *testing.T) {
			b := newNode(t, 2)
			c := b.raw()
			_, err := c.Write(bytes)
			require.NoError(t, err)
			require.NoError(t, c.SetReadDeadline(time.Now().Add(helloTimeout/2)))
			_, err = io.Copy(io.Discard, c)
			var late net.Error
			require.False(t, errorsAs(err, &late) && late.Timeout(), "still open: it should not wait for more")
		})
	}
}

func errorsAs(err error, target *net.Error) bool {
	e, ok := err.(net.Error)
	if ok {
		*target = e
	}
	return ok
}

func repeated(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func TestSilentStrangersAreBounded(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	var first net.Conn
	for i := range maxStrangers + 20 {
		c := b.raw()
		if i == 0 {
			first = c
		}
		_, err := c.Write([]byte(magic[:4])) // half a preamble
		require.NoError(t, err)
	}
	a.mustDial(b) // all places are taken, and yet
	requireJoined(t, a, b)
	require.NoError(t, first.SetReadDeadline(time.Now().Add(patient)))
	_, err := first.Read(make([]byte, 1))
	require.Error(t, err, "the oldest had to go")
	b.Manager.mu.Lock()
	silent := b.strangers.silent.Len()
	b.Manager.mu.Unlock()
	require.LessOrEqual(t, silent, maxStrangers)
}

func TestDialerMeetsAnotherProtocol(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	for name, answer := range map[string]string{"http": "HTTP/1.1 400 Bad Request\r\n\r\n", "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer l.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte(answer))
				_ = c.(*net.TCPConn).CloseWrite()
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}()
			_, err = a.dialTo(l.Addr().String())
			require.ErrorIs(t, err, status.LinkFailed)
			if answer != "" {
				require.ErrorContains(t, err, "peer does not speak this protocol")
			}
			<-done
		})
	}
}

func TestUnknownControlFramesAreSkipped(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.mustDial(b)
	la, lb := a.mustLink(2), b.mustLink(1)
	_, err := la.control.Write(appendFrame(nil, 4711, make([]byte, 100_000)))
	require.NoError(t, err)
	requireJoined(t, a, b)
	_, err = la.control.Write([]byte{0xff, 0xff, 0xff, 0x7f, 0, 0})
	require.NoError(t, err)
	requireDead(t, lb, patient)
	require.ErrorContains(t, lb.Cause(), errTooLarge.Error())
}

func FuzzHello(f *testing.F) {
	h := hello{Incarnation: make([]byte, 16), ClusterID: 1, Offers: []string{"tcp"}, Token: make([]byte, 16), Nonce: make([]byte, 16)}
	for _, i := range []intent{intentControl, intentData, intentUnlink} {
		f.Add(appendBlock(ourPreamble(i).append(nil), h))
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		pre, err := readPreamble(r)
		if err != nil {
			return
		}
		require.Equal(t, b[:preambleBytes], pre.append(nil))
		h, err := readHello(r, pre.intent)
		if err != nil {
			return
		}
		require.Len(t, h.Incarnation, 16)
		require.LessOrEqual(t, h.DataConnections, uint32(MaxDataConnections))
		again, err := readHello(bytes.NewReader(appendBlock(nil, h)), pre.intent)
		require.NoError(t, err)
		require.Equal(t, h.Incarnation, again.Incarnation)
		require.Equal(t, h.PatienceMillis, again.PatienceMillis)
		require.GreaterOrEqual(t, patience(h), time.Millisecond)
		require.LessOrEqual(t, patience(h), maxPatience)
	})
}

func FuzzControlFrame(f *testing.F) {
	f.Add(appendFrame(nil, frameReady, encode(ready{SameHost: true})))
	f.Add(appendFrame(nil, frameRefuse, encode(refusalOf(status.AlreadyLink, "no"))))
	f.Add(appendFrame(appendFrame(nil, 99, []byte("?")), frameReady, encode(ready{Reason: "x"})))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v ready
		err := readFrame(bytes.NewReader(b), frameReady, &v)
		if err != nil {
			require.LessOrEqual(t, len(err.Error()), 4*maxTextBytes)
			return
		}
		var again ready
		require.NoError(t, readFrame(bytes.NewReader(appendFrame(nil, frameReady, encode(v))), frameReady, &again))
		require.Equal(t, v, again)
	})
}
