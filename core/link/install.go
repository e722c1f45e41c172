// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// install makes the session and the link. It takes data and witness over. Without an error the caller has to start the link.
func (a *attempt) install(data []*conn, witness Witness, reason string) (*Link, error) {
	m := a.m
	l := &Link{
		manager: m, number: a.number, control: a.control, dead: make(chan struct{}), gone: make(chan struct{}),
		peer: Peer{ClusterID: a.theirs.ClusterID, Incarnation: a.peer, Address: a.address, Dialed: a.dialed,
			Local: a.control.LocalAddr().String(), Card: a.theirs.Card,
			SameHost: witness != nil, SameHostReason: reason, Witness: witness, Transports: a.usable},
		rejected: a.rejected,
	}
	l.peer.Until, _ = a.ctx.Deadline()
	l.peer.link = l
	if witness != nil && witness.Withheld() != nil {
		m.eventOf(Warning, l.peer.ClusterID, "nothing was handed to a peer on the same host", witness.Withheld())
	}
	l.pings.every = pace(m.cfg.PeerDead, time.Duration(min(a.theirs.PeerDeadMillis, uint64(maxPatience.Milliseconds())))*time.Millisecond)
	l.pings.limit = m.cfg.PeerDead
	err := a.attach(l, data)
	if err == nil {
		err = a.commit(l)
	}
	if err != nil {
		l.discard(err)
		return nil, err
	}
	return l, nil
}

// attach makes the data connections and the session, after the predecessor's have ended.
func (a *attempt) attach(l *Link, data []*conn) error {
	conns, err := a.m.takeData(data)
	if err != nil {
		return err
	}
	for _, c := range conns {
		l.paths = append(l.paths, c.Path())
	}
	a.m.makeRoom(l.peer.ClusterID)
	attached, err := a.m.cfg.Attach(l.peer, conns)
	if err != nil {
		code := status.LinkFailed
		if known := new(status.Error); errors.As(err, &known) {
			code, err = known.Code, errors.New(known.Cause)
		}
		return status.Newf(code, status.StageHandshake, "make the session: %w", err)
	}
	l.session, l.transport = attached.Session, attached.Transport
	l.rejected = slices.Concat(l.rejected, attached.Rejected)
	return nil
}

// takeData turns connections into data connections, all or none.
func (m *Manager) takeData(data []*conn) ([]transport.Conn, error) {
	var conns []transport.Conn
	var failed error
	for _, c := range data {
		if failed != nil {
			_ = c.Close()
			continue
		}
		taken, err := m.cfg.Network.Data(c.release())
		if err != nil {
			failed = status.Newf(status.LinkFailed, status.StageHandshake, "data connection: %w", err)
			continue
		}
		conns = append(conns, taken)
	}
	if failed == nil {
		return conns, nil
	}
	for _, c := range conns {
		c.Shutdown()
		_ = c.Close()
	}
	return nil, failed
}

// makeRoom retires the link under id, which is one to another incarnation: its engine was restarted or replaced.
func (m *Manager) makeRoom(id uint64) {
	for {
		m.mu.Lock()
		var old *Link
		if r := m.records[id]; r != nil {
			old = r.link
		}
		m.mu.Unlock()
		if old == nil || old.isGone() {
			return
		}
		m.retire(old, "replaced by a new link")
	}
}

// commit installs l, unless something came in between.
func (a *attempt) commit(l *Link) error {
	m := a.m
	if !a.unbind() {
		return context.Cause(a.ctx)
	}
	for {
		m.makeRoom(l.peer.ClusterID)
		m.mu.Lock()
		if err := a.obstacle(l); err != nil {
			m.mu.Unlock()
			return err
		}
		r := m.recordOf(l.peer.ClusterID)
		if r.link != nil && !r.link.isGone() {
			m.mu.Unlock()
			continue
		}
		m.enlist(r, l)
		a.pair.link, a.pair.last = l, l
		a.installed = true
		m.mu.Unlock()
		_ = a.control.SetDeadline(time.Time{})
		return nil
	}
}

// enlist makes l the link of its cluster id. The caller holds m.mu, and starts the link after.
func (m *Manager) enlist(r *record, l *Link) {
	m.serial++
	l.serial = m.serial
	r.link, r.ended = l, ""
	close(m.installed)
	m.installed = make(chan struct{})
	m.tasks.Add(1) // for the goroutine of l.start
}

// obstacle says why l can't be installed any more. The caller holds m.mu.
func (a *attempt) obstacle(l *Link) error {
	switch {
	case a.m.closed:
		return errFinalized
	case a.ctx.Err() != nil:
		return context.Cause(a.ctx)
	case !l.lives():
		return l.cause
	case !a.slot && a.pair.current != a:
		return errSuperseded
	}
	return nil
}

// discard ends what was made for a link that is not installed; the control connection is the attempt's.
func (l *Link) discard(cause error) {
	l.manager.kill(l, peerDied(l.peer, cause))
	if l.session != nil {
		l.session.Close(l.cause)
	}
	if l.peer.Witness != nil {
		l.peer.Witness.Close()
	}
}
