// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

const (
	farewellOurs   = "unlinked"
	farewellTheirs = "unlinked by the peer"
)

// ErrBusy is why a link could not be unlinked in time.
var ErrBusy = errors.New("operations on the link did not end in time")

// Unlink ends the link to the engine that reports id. Without force it asks the engine at address to drop its end first and waits for
// operations under way; when that fails, with UnlinkFailed or Timeout, the link stays. With force it only drops our end. Where there is
// no link, or a dead one, it succeeds.
func (m *Manager) Unlink(ctx context.Context, id uint64, address string, force bool) error {
	ctx, end, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	m.mu.Lock()
	r := m.records[id]
	var l *Link
	if r != nil {
		l = r.link
	}
	dead := l != nil && !l.lives()
	m.mu.Unlock()
	switch {
	case l == nil && (force || m.standsFor(id)):
		return nil
	case force || dead:
		m.drop(id, l, farewellOurs)
		return nil
	}
	if failure := m.unlinkBoth(ctx, id, address, l); failure != nil {
		failure = failure.At(id, address)
		m.failed(id, "unlink failed", failure)
		return failure
	}
	return nil
}

func (m *Manager) standsFor(id uint64) bool { return m.cfg.StandsFor != nil && m.cfg.StandsFor(id) }

// drop retires l, if it lives, and forgets it.
func (m *Manager) drop(id uint64, l *Link, farewell string) {
	m.retire(l, farewell)
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.records[id]; r != nil && r.link == l {
		r.link, r.ended = nil, farewell
	}
}

// unlinkBoth asks the peer, where it is another engine, and then drops l, which is nil where only the peer may have a link.
func (m *Manager) unlinkBoth(ctx context.Context, id uint64, address string, l *Link) *status.Error {
	m.setFarewell(l, farewellOurs)
	// Our own pulls end first: the peer only knows when it has sent the last byte of them, or nothing where we read its memory directly.
	if l != nil && !l.waitIdle(ctx) {
		m.setFarewell(l, "")
		return explainAs(ctx, status.Timeout, status.StageClose, ErrBusy)
	}
	if l == nil || l.control != nil {
		if err := m.askUnlink(ctx, id, address); err != nil {
			m.setFarewell(l, "")
			return err
		}
	}
	if l == nil {
		return nil
	}
	// The peer's end is idle and gone. What is left to end is local, and ends by itself.
	l.waitIdle(ctx)
	m.drop(id, l, farewellOurs)
	return nil
}

// setFarewell keeps new operations off l, or lets them in again with "".
func (m *Manager) setFarewell(l *Link, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l == nil || !l.lives() {
		return
	}
	switch {
	case text != "" && l.farewell == "":
		l.stays = make(chan struct{})
	case text == "" && l.farewell != "":
		close(l.stays)
	}
	l.farewell = text
}

// waitIdle waits until no operation of l is under way or l is dead; false when ctx ended first.
func (l *Link) waitIdle(ctx context.Context) bool {
	if l.session == nil {
		return true
	}
	select {
	case <-l.session.Idle():
	case <-l.dead:
	case <-ctx.Done():
		return false
	}
	return true
}

// askUnlink asks the engine at address to drop its link to us.
func (m *Manager) askUnlink(ctx context.Context, id uint64, address string) *status.Error {
	raw, err := m.cfg.Network.Dial(ctx, "", address)
	if err != nil {
		return explainAs(ctx, status.UnlinkFailed, status.StageDial, fmt.Errorf("connect: %w", err))
	}
	c := m.fds.own(raw)
	defer func() { _ = c.Close() }()
	unbind := c.bind(ctx)
	defer unbind()
	h := hello{Incarnation: m.incarnation[:], ClusterID: m.cfg.ClusterID, Target: id, PatienceMillis: patienceOf(ctx)}
	_, err = c.Write(appendBlock(ourPreamble(intentUnlink).append(nil), h))
	if err == nil {
		_, err = readAnswer(c, intentUnlink)
	}
	if err == nil {
		err = readFrame(c, frameDone, nil)
	}
	if err == nil {
		return nil
	}
	var no *refused
	if errors.As(err, &no) && no.code != status.Timeout {
		no.code = status.UnlinkFailed
	}
	return explainAs(ctx, status.UnlinkFailed, status.StageClose, err)
}

// acceptUnlink drops the link to the engine that asks. It owns c.
func (m *Manager) acceptUnlink(c *conn, h hello) {
	defer func() { _ = c.Close() }()
	err := m.within(c, patience(h)+drainFor, func() error {
		if _, err := c.Write(ourPreamble(intentUnlink).append(nil)); err != nil {
			return err
		}
		answer := appendFrame(nil, frameDone, nil)
		if !m.dropFor(h) {
			no := refusalOf(status.Timeout, "operations on the link did not end in time")
			answer = appendFrame(nil, frameRefuse, encode(no))
		}
		_, err := c.Write(answer)
		return err
	})
	if err != nil && m.ctx.Err() == nil {
		m.eventOf(Info, h.ClusterID, "an unlink that the peer asked for could not be answered", err)
	}
}

// dropFor waits until the link to the engine that sent h is idle and retires it; false when its patience was over first.
func (m *Manager) dropFor(h hello) bool {
	m.mu.Lock()
	var l *Link
	if p := m.pairs[Incarnation(h.Incarnation)]; p != nil && h.Target == m.cfg.ClusterID {
		l = p.link
	}
	m.mu.Unlock()
	if l == nil {
		return true
	}
	m.setFarewell(l, farewellTheirs)
	ctx, cancel := context.WithTimeout(m.ctx, patience(h))
	defer cancel()
	if !l.waitIdle(ctx) {
		m.setFarewell(l, "")
		return false
	}
	m.drop(l.peer.ClusterID, l, farewellTheirs)
	return true
}

// Remember keeps a failure for Explain.
func (m *Manager) Remember(id uint64, failure error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.recordOf(id).failure = time.Now().UTC().Format(time.RFC3339) + " " + failure.Error()
}

// failed logs a failure and keeps it for Explain.
func (m *Manager) failed(id uint64, text string, failure error) {
	m.Remember(id, failure)
	m.eventOf(Error, id, text, failure)
}

// Refused keeps and logs a failure that the engine found before it came to the link, with what was refused: see [Manager.Explain].
func (m *Manager) Refused(id uint64, what string, failure error) { m.failed(id, what, failure) }
