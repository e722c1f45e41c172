// SPDX-License-Identifier: Apache-2.0

package fabric

import (
	"io"
	"net"
	"os"
	"time"
)

// networkName is what errors call the network.
const networkName = "fabric"

// conn is an end as a net.Conn. It behaves as one of TCP: Close lets the peer read what was sent and then io.EOF, deadlines end calls
// that wait with os.ErrDeadlineExceeded, and many goroutines may call it.
type conn struct {
	end *end

	// Guarded by the network's lock.
	taken           bool // Host.Data has it
	readBy, writeBy time.Time
	writing         bool // one Write at a time: what two goroutines write is not mixed
}

var _ net.Conn = (*conn)(nil)

// Read reads at least one byte.
func (c *conn) Read(b []byte) (int, error) {
	defer c.lock()()
	e := c.end
	for {
		if err := c.usable(c.readBy); err != nil {
			return 0, c.failure("read", err)
		}
		n, err := e.readable()
		switch {
		case err == io.EOF && len(b) > 0:
			return 0, io.EOF
		case err != nil && err != io.EOF:
			return 0, c.failure("read", err)
		case len(b) == 0:
			return 0, nil
		case n > 0:
			b = b[:min(n, uint64(len(b)))]
			e.take(b)
			e.taken()
			return len(b), nil
		}
		e.connection.alarm.wait(earliest(c.readBy, e.nextNews()))
	}
}

// Write writes all of b, or returns how much of it and why.
func (c *conn) Write(b []byte) (int, error) {
	defer c.lock()()
	alarm := c.end.connection.alarm
	for c.writing {
		if err := c.usable(c.writeBy); err != nil {
			return 0, c.failure("write", err)
		}
		alarm.wait(c.writeBy)
	}
	c.writing = true
	defer func() {
		c.writing = false
		alarm.cond.Broadcast()
	}()
	written := 0
	for {
		if err := c.usable(c.writeBy); err != nil {
			return written, c.failure("write", err)
		}
		n, err := c.end.writable()
		if err != nil {
			return written, c.failure("write", err)
		}
		if n = min(n, uint64(len(b)-written)); n > 0 {
			first := c.end.out.written
			c.end.give(b[written:][:n])
			c.end.sent(first)
			written += int(n)
		}
		if written == len(b) {
			return written, nil
		}
		if n == 0 {
			alarm.wait(earliest(c.writeBy, c.end.nextNews()))
		}
	}
}

// Close ends both directions. A call that waits returns net.ErrClosed.
func (c *conn) Close() error {
	defer c.lock()()
	if c.taken {
		return nil
	}
	if !c.end.release() {
		return c.failure("close", net.ErrClosed)
	}
	return nil
}

// CloseWrite ends one direction: the peer reads what was sent and then io.EOF, and can still send.
func (c *conn) CloseWrite() error {
	defer c.lock()()
	if c.taken || c.end.shut {
		return c.failure("close", net.ErrClosed)
	}
	c.end.finish()
	return nil
}

// LocalAddr returns "ip:port" of this end.
func (c *conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.end.local) }

// RemoteAddr returns "ip:port" of the peer's end.
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.end.remote) }

// SetDeadline sets when reads and writes end, also those under way; the zero time is no limit.
func (c *conn) SetDeadline(t time.Time) error { return c.setDeadlines(t, &c.readBy, &c.writeBy) }

// SetReadDeadline is SetDeadline for reads.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadlines(t, &c.readBy) }

// SetWriteDeadline is SetDeadline for writes.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, &c.writeBy) }

func (c *conn) setDeadlines(t time.Time, deadlines ...*time.Time) error {
	defer c.lock()()
	if c.taken || c.end.shut {
		return c.failure("set deadline", net.ErrClosed)
	}
	for _, d := range deadlines {
		*d = t
	}
	c.end.connection.alarm.cond.Broadcast() // who waits names the new time
	return nil
}

func (c *conn) lock() (unlock func()) {
	mu := &c.end.connection.network.mu
	mu.Lock()
	return mu.Unlock
}

// usable says why a call with a deadline can't go on.
func (c *conn) usable(deadline time.Time) error {
	if c.taken || c.end.shut {
		return net.ErrClosed
	}
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (c *conn) failure(operation string, err error) error {
	return &net.OpError{Op: operation, Net: networkName, Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
