// SPDX-License-Identifier: Apache-2.0

package link

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// acceptEach hands each connection that comes in to admit, until ended is closed; whoever closes it closes the listener then. After a
// failure, which failed may be told of, it tries again in a while.
func (d Descriptors) acceptEach(ctx context.Context, l net.Listener, ended <-chan struct{}, failed func(error), admit func(*conn)) {
	for {
		raw, err := l.Accept()
		select {
		case <-ended:
			if err == nil {
				_ = raw.Close()
			}
			return
		default:
		}
		if err != nil {
			if failed != nil {
				failed(err)
			}
			pause(ctx, acceptPause)
			continue
		}
		admit(d.own(raw))
	}
}

// strangers bounds the accepted connections whose other ends have not been let in anywhere. Guarded by a lock of its owner.
type strangers struct {
	silent list.List // of *conn: those that have not said anything, oldest first
	total  int
}

// enter gives c a place; nil: there is none. When too many are silent the oldest one has to go, and is returned, to be closed without the
// lock: whoever speaks the protocol says hello at once.
func (s *strangers) enter(c *conn) (place *list.Element, evicted *conn) {
	if s.total >= maxHandshakes {
		return nil, nil
	}
	if s.silent.Len() >= maxStrangers {
		evicted = s.silent.Remove(s.silent.Front()).(*conn)
	}
	s.total++
	return s.silent.PushBack(c), evicted
}

// spoke says that the one at a place is not silent any more. It does nothing where he was evicted.
func (s *strangers) spoke(place *list.Element) { s.silent.Remove(place) }

// leave gives a place back.
func (s *strangers) leave() { s.total-- }

// complaints are the lines that strangers can make us log as often as they like: each kind comes once in a while. Guarded by Manager.mu.
type complaints struct {
	turnedAway, otherVersions, refusing quiet
}

// quiet is when a kind of line was logged last, and how many were not logged since. Guarded by Manager.mu.
type quiet struct {
	logged     time.Time
	unreported int
}

// otherVersion is the failure to meet an engine that speaks another major version.
type otherVersion struct{ error }

// accept lets connections in until the listener is stopped.
func (m *Manager) accept(l *listening) {
	defer m.tasks.Done()
	defer close(l.done)
	failed := func(err error) { m.quietly(&m.complaints.refusing, "can not accept a connection", err) }
	m.fds.acceptEach(m.ctx, l, l.stopped, failed, func(c *conn) { m.admit(c, l.near) })
}

// admit gives c a goroutine and a place among the strangers. near: it can only be a data connection.
func (m *Manager) admit(c *conn, near bool) {
	var place *list.Element
	var evicted *conn
	m.mu.Lock()
	if !m.closed {
		if place, evicted = m.strangers.enter(c); place != nil {
			m.tasks.Add(1)
		}
	}
	m.mu.Unlock()
	if evicted != nil {
		_ = evicted.Close()
	}
	if place == nil {
		_ = c.Close()
		return
	}
	go m.serve(c, place, near)
}

// serve finds out what c wants and does it. It owns c.
func (m *Manager) serve(c *conn, place *list.Element, near bool) {
	defer m.tasks.Done()
	defer func() {
		m.mu.Lock()
		m.strangers.leave()
		m.mu.Unlock()
	}()
	pre, h, err := m.meet(c)
	m.mu.Lock()
	m.strangers.spoke(place)
	m.mu.Unlock()
	if err == nil && near && pre.intent != intentData {
		err = fmt.Errorf("intent %d where only data connections come in", pre.intent)
	}
	if err != nil {
		if m.ctx.Err() == nil {
			m.turnedAway(c, err)
		}
		_ = c.Close()
		return
	}
	switch pre.intent {
	case intentControl:
		m.acceptControl(c, h)
	case intentData:
		m.acceptData(c, h)
	case intentUnlink:
		m.acceptUnlink(c, h)
	}
}

// meet reads the preamble and the hello of a connection, and refuses what it can't understand.
func (m *Manager) meet(c *conn) (preamble, hello, error) {
	var pre preamble
	var h hello
	err := m.within(c, helloTimeout, func() (err error) {
		if pre, err = readPreamble(c); err != nil {
			return err
		}
		if pre.major != major {
			err = fmt.Errorf("peer speaks version %d.%d of the protocol, this engine %d.%d", pre.major, pre.minor, major, minor)
			_ = c.refuse(refusalOf(status.LinkFailed, "%v", err))
			return &otherVersion{err}
		}
		switch pre.intent {
		case intentControl, intentData, intentUnlink:
		default:
			return fmt.Errorf("unknown intent %d", pre.intent)
		}
		h, err = readHello(c, pre.intent)
		return err
	})
	return pre, h, err
}

// within runs f, in which reads and writes on c fail when d is over or the manager is closed.
func (m *Manager) within(c *conn, d time.Duration, f func() error) error {
	return c.within(m.ctx, d, f)
}

// within runs f, in which reads and writes on c fail when d is over or ctx has ended.
func (c *conn) within(ctx context.Context, d time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	unbind := c.bind(ctx)
	err := f()
	if !unbind() && err == nil {
		err = ctx.Err()
	}
	_ = c.SetDeadline(time.Time{})
	return err
}

// refuse answers a preamble with a refusal, so that it arrives.
func (c *conn) refuse(no refusal) error {
	_, err := c.Write(appendBlock(ourPreamble(intentRefuse).append(nil), no))
	if err == nil {
		c.drain()
	}
	return err
}

// turnedAway logs that c was closed because of err.
func (m *Manager) turnedAway(c *conn, err error) {
	q := &m.complaints.turnedAway
	if other := new(otherVersion); errors.As(err, &other) {
		q = &m.complaints.otherVersions
	}
	m.quietly(q, fmt.Sprintf("closed a connection from %s", c.RemoteAddr()), err)
}

// quietly logs a line unless one of its kind was logged a moment ago.
func (m *Manager) quietly(q *quiet, text string, cause error) {
	m.mu.Lock()
	now := time.Now()
	if !q.logged.IsZero() && now.Sub(q.logged) < strangerQuiet {
		q.unreported++
		m.mu.Unlock()
		return
	}
	if q.unreported > 0 {
		text = fmt.Sprintf("%s (%d more like it since the last line)", text, q.unreported)
	}
	q.logged, q.unreported = now, 0
	m.mu.Unlock()
	m.event(Warning, text, cause)
}

// pending is a handshake that waits for its data connections. Guarded by Manager.mu.
type pending struct {
	peer     Incarnation
	conns    []*conn // by index; nil: not there yet
	missing  int
	complete chan struct{} // closed when missing becomes 0
}

// expect lets n data connections of peer in that show nonce, until unexpect. It returns nil where the nonce is in use.
func (m *Manager) expect(nonce Nonce, peer Incarnation, n uint32) *pending {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending[nonce] != nil {
		return nil
	}
	p := &pending{peer: peer, conns: make([]*conn, n), missing: int(n), complete: make(chan struct{})}
	if n == 0 {
		close(p.complete)
	}
	m.pending[nonce] = p
	return p
}

// unexpect closes what nobody took.
func (m *Manager) unexpect(nonce Nonce) {
	for _, c := range m.takePending(nonce) {
		if c != nil {
			_ = c.Close()
		}
	}
}

// takePending ends the waiting and returns the connections that came.
func (m *Manager) takePending(nonce Nonce) []*conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[nonce]
	delete(m.pending, nonce)
	if p == nil {
		return nil
	}
	return p.conns
}

// acceptData hands c to the handshake that it belongs to.
func (m *Manager) acceptData(c *conn, h hello) {
	err := m.within(c, helloTimeout, func() error {
		if !m.deliver(h, nil) {
			_ = c.refuse(refusalOf(status.LinkFailed, "data connection of no link that is being made here"))
			return errors.New("data connection of no link")
		}
		_, err := c.Write(ourPreamble(intentData).append(nil))
		return err
	})
	if err != nil || !m.deliver(h, c) {
		_ = c.Close()
	}
}

// deliver puts c in its place; with c == nil it only says whether there is one.
func (m *Manager) deliver(h hello, c *conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pending[Nonce(h.Nonce)]
	if p == nil || p.peer != Incarnation(h.Incarnation) || int(h.Index) >= len(p.conns) || p.conns[h.Index] != nil {
		return false
	}
	if c == nil {
		return true
	}
	p.conns[h.Index] = c
	if p.missing--; p.missing == 0 {
		close(p.complete)
	}
	return true
}
