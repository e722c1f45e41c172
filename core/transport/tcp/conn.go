// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Conn is a data connection over a kernel socket. It implements transport.Conn. The socket blocks, with a time-out, and is driven by
// system calls of the calling goroutine's thread; only a parked connection is known to a poller.
type Conn struct {
	fd      int
	path    string
	near    bool // a Unix socket
	local   bool
	number  int // of both ends, added
	poller  *poller
	ended   atomic.Bool
	endOnce sync.Once
	batch   int // see Batch; whoever receives works on it

	mu        sync.Mutex // guards what follows
	parked    bool
	unwatched bool // nobody parked is woken by what comes
}

// NewConn takes over c, which must be a TCP connection or a Unix socket's, as a data connection. It takes c over in any case.
func NewConn(c net.Conn) (transport.Conn, error) {
	defer func() { _ = c.Close() }() // the descriptor lives on as its duplicate
	raw, ok := c.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("use a %T as a data connection", c)
	}
	local, remote := c.LocalAddr(), c.RemoteAddr()
	_, near := c.(*net.UnixConn)
	fd, err := duplicate(raw)
	if err != nil {
		return nil, fmt.Errorf("take over a data connection: %w", err)
	}
	made := &Conn{fd: fd, near: near, local: near || isLocalPath(local, remote), number: numberOf(local) + numberOf(remote), batch: 1}
	if made.poller, err = sharedPoller(); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("start the poller of idle connections: %w", err)
	}
	if err := mem.Track(fd); err != nil {
		made.poller.release()
		_ = unix.Close(fd)
		return nil, err
	}
	kind, err := made.tune()
	if err != nil {
		_ = made.Close()
		return nil, fmt.Errorf("tune a data connection: %w", err)
	}
	made.path = fmt.Sprintf("%s -> %s, %s", local, remote, kind)
	return made, nil
}

func duplicate(raw syscall.Conn) (int, error) {
	control, err := raw.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var failed error
	if err := control.Control(func(from uintptr) {
		fd, failed = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, err
	}
	return fd, failed
}

// tune sets what a data connection needs and returns what is to be said of it beside its ends.
func (c *Conn) tune() (kind string, err error) {
	if err := unix.SetNonblock(c.fd, false); err != nil {
		return "", err
	}
	wait := unix.NsecToTimeval(int64(transport.MaxWaitMillis * time.Millisecond))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return "", err
	}
	if c.near {
		return "Unix sockets", nil
	}
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
		return "", err
	}
	if err := unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return "", err
	}
	algorithm, err := chooseCongestion(c.fd, c.local)
	return "congestion control " + algorithm, err
}

// loopbackCongestion replaces pacing algorithms on a path that never leaves the host: where bbr is the system's default, its pacing
// alone costs half to two thirds of the throughput there. On a wire the system's choice stands.
const loopbackCongestion = "cubic"

// Control gives a socket its congestion control before it is bound or connected. It can't come later: a connection that was made under
// a pacing algorithm is paced for ever, with a timer for each packet, whatever algorithm comes next. NewConn gives the system's choice
// back where the path is a wire. A system that does not allow it costs only speed.
func Control(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		if name, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil {
			systemCongestion.CompareAndSwap(nil, &name)
		}
		_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, loopbackCongestion)
	})
}

// systemCongestion is what a socket has that Control has not seen yet; nil where that is not known.
var systemCongestion atomic.Pointer[string]

// chooseCongestion sets the congestion control of a connection and returns its name.
func chooseCongestion(fd int, local bool) (string, error) {
	name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil {
		return "", err
	}
	wanted := name
	if system := systemCongestion.Load(); local && name != "reno" {
		wanted = loopbackCongestion
	} else if !local && system != nil {
		wanted = *system
	}
	if name == wanted {
		return name, nil
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, wanted); err != nil {
		return name + " (" + wanted + " is not allowed here: " + err.Error() + ")", nil
	}
	return wanted, nil
}

// isLocalPath reports that both ends of a connection have the same address or a loopback one: its packets never leave the host.
// Only speed hangs on it, never trust.
func isLocalPath(local, remote net.Addr) bool {
	l, lok := local.(*net.TCPAddr)
	r, rok := remote.(*net.TCPAddr)
	return lok && rok && (r.IP.IsLoopback() || l.IP.Equal(r.IP))
}

// numberOf is a number that tells an address from others of its host.
func numberOf(addr net.Addr) int {
	switch at := addr.(type) {
	case *net.TCPAddr:
		return at.Port
	case *net.UnixAddr:
		return int(crc32.ChecksumIEEE([]byte(at.Name)) >> 16)
	}
	return 0
}

// LocalPath says whether both ends are on this host, and returns a number that both know alike.
func (c *Conn) LocalPath() (int, bool) { return c.number, c.local }

// Bound limits what is sent ahead of the receiver. A system that does not allow it costs only speed.
func (c *Conn) Bound(bytes int) { _ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, bytes) }

// Batch has the kernel wake who waits in Receive when so many bytes have come, instead of at the first. They must be certain to come. It
// does nothing on a Unix socket, for which the kernel would wake the thread for each piece all the same.
func (c *Conn) Batch(bytes int) {
	if !c.near && c.batch != bytes && unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, bytes) == nil {
		c.batch = bytes
	}
}

// Receive implements transport.Conn.
func (c *Conn) Receive(spans []mem.Span) (int, error) {
	n, err := mem.ReceiveSpans(c.fd, spans, 0)
	return c.received(n, err)
}

// TryReceive implements transport.Conn.
func (c *Conn) TryReceive(spans []mem.Span) (int, error) {
	n, err := mem.ReceiveSpans(c.fd, spans, unix.MSG_DONTWAIT)
	return c.received(n, err)
}

func (c *Conn) received(n int, err error) (int, error) {
	switch {
	case err == nil && n == 0:
		return 0, io.EOF
	case n > 0 && !errors.Is(err, unix.EFAULT):
		return n, nil
	}
	return n, c.explained(err)
}

// Send implements transport.Conn.
func (c *Conn) Send(spans []mem.Span) (int, error) {
	if c.near {
		return c.sendNear(spans)
	}
	n, err := mem.SendSpans(c.fd, spans, 0)
	return n, c.explained(err)
}

// sendNear is Send on a Unix socket, which has no time-out for a call: it makes pieces of some 32 KiB of what it is given, and would
// wait anew for each.
func (c *Conn) sendNear(spans []mem.Span) (int, error) {
	if n, err := c.TrySend(spans); n > 0 || err != nil {
		return n, err
	}
	room := [1]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLOUT}}
	if _, err := unix.Poll(room[:], transport.MaxWaitMillis); err != nil && err != unix.EINTR {
		return 0, err
	}
	return c.TrySend(spans)
}

// TrySend implements transport.Conn.
func (c *Conn) TrySend(spans []mem.Span) (int, error) {
	n, err := mem.SendSpans(c.fd, spans, unix.MSG_DONTWAIT)
	return n, c.explained(err)
}

// explained drops the errors that only mean "not now".
func (c *Conn) explained(err error) error {
	if err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		if c.ended.Load() {
			return net.ErrClosed
		}
		return nil
	}
	return err
}

// Park implements transport.Conn.
func (c *Conn) Park() {
	c.mu.Lock()
	roused := c.poller.list(c.fd, !c.unwatched)
	c.parked = true
	c.mu.Unlock()
	if c.ended.Load() { // Shutdown may have come before fd was listed
		c.poller.rouse(c.fd)
	}
	<-roused
	c.mu.Lock()
	defer c.mu.Unlock()
	c.parked = false
	c.poller.unlist(c.fd)
}

// Rouse ends Park where somebody is parked.
func (c *Conn) Rouse() { c.poller.rouse(c.fd) }

// Watch says whether what comes is to wake who is parked, now and later. It is not where somebody else receives.
func (c *Conn) Watch(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unwatched = !on
	if c.parked {
		c.poller.arm(c.fd, on)
	}
}

// Shutdown implements transport.Conn.
func (c *Conn) Shutdown() {
	c.endOnce.Do(func() {
		c.ended.Store(true)
		_ = unix.Shutdown(c.fd, unix.SHUT_RDWR) // ENOTCONN: the peer was faster
		c.poller.rouse(c.fd)
	})
}

// Close implements transport.Conn.
func (c *Conn) Close() error {
	c.Shutdown()
	mem.Untrack(c.fd)
	c.poller.release()
	return unix.Close(c.fd)
}

// Path implements transport.Conn.
func (c *Conn) Path() string { return c.path }
