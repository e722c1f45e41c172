// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// TCP is the Network of production: IPv4 and IPv6, addresses only, no names. NewData makes a data connection of a TCP connection and
// owns it from then on.
type TCP struct {
	NewData func(net.Conn) (transport.Conn, error)
	// Control, where it is set, prepares a socket before it is bound or connected.
	Control func(network, address string, c syscall.RawConn) error
}

// Listen binds address. An IPv4 address means IPv4 only.
func (t TCP) Listen(address string) (net.Listener, error) {
	network, err := networkOf(address)
	if err != nil {
		return nil, err
	}
	config := net.ListenConfig{KeepAlive: -1, Control: t.Control}
	config.SetMultipathTCP(false) // Go turns it on, and it changes what the sockets can do
	return config.Listen(context.Background(), network, address)
}

// Dial connects to address.
func (t TCP) Dial(ctx context.Context, source, address string) (net.Conn, error) {
	network, err := networkOf(address)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{KeepAlive: -1, Control: t.Control}
	dialer.SetMultipathTCP(false)
	if source != "" {
		ip, err := netip.ParseAddr(source)
		if err != nil {
			return nil, fmt.Errorf("source address: %w", err)
		}
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	}
	return dialer.DialContext(ctx, network, address)
}

// Data hands c to NewData.
func (t TCP) Data(c net.Conn) (transport.Conn, error) { return t.NewData(c) }

// Prover returns the proof over an abstract Unix socket.
func (t TCP) Prover() Prover { return UnixProver{} }

func networkOf(address string) (string, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return "", err
	}
	if at.Addr().Is4() {
		return "tcp4", nil // "tcp" would make 0.0.0.0 mean IPv6 as well
	}
	return "tcp", nil
}

// track tells Track of the descriptor of c, if it has one.
func (d Descriptors) track(c any) { d.tell(d.Track, c) }

// untrack tells Untrack; it comes before Close, so that the number still is ours.
func (d Descriptors) untrack(c any) { d.tell(d.Untrack, c) }

func (d Descriptors) tell(whom func(int), c any) {
	sc, ok := c.(syscall.Conn)
	if !ok || whom == nil {
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { whom(int(fd)) })
	}
}

// trackFD and untrackFD are for bare descriptors.
func (d Descriptors) trackFD(fd int) {
	if d.Track != nil {
		d.Track(fd)
	}
}

func (d Descriptors) untrackFD(fd int) {
	if d.Untrack != nil {
		d.Untrack(fd)
	}
}

// conn is a connection whose descriptor is in the table as long as it is open.
type conn struct {
	net.Conn
	fds  Descriptors
	once sync.Once
}

func (d Descriptors) own(c net.Conn) *conn {
	d.track(c)
	return &conn{Conn: c, fds: d}
}

// Close closes the connection once.
func (c *conn) Close() error {
	var err error
	c.once.Do(func() {
		c.fds.untrack(c.Conn)
		err = c.Conn.Close()
	})
	return err
}

// release hands the connection to a new owner; Close does nothing any more.
func (c *conn) release() net.Conn {
	c.once.Do(func() { c.fds.untrack(c.Conn) })
	return c.Conn
}

// past is a deadline that makes reads and writes fail at once.
var past = time.Unix(1, 0)

// bind makes reads and writes on c fail as soon as ctx ends. The function that it returns undoes that and says whether ctx still
// lived, so that c can go on.
func (c *conn) bind(ctx context.Context) (unbind func() bool) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(past) })
	return stop
}

// drain closes the sending side and reads for a while what the peer still sends: closing a socket that has unread bytes would reset
// the connection, and the peer would lose our last answer.
func (c *conn) drain() {
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(drainFor))
	var scratch [4 << 10]byte
	for range maxHandshakeBytes / len(scratch) {
		if _, err := c.Read(scratch[:]); err != nil {
			return
		}
	}
}
