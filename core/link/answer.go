// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// acceptControl is the acceptor's side. It owns c.
func (m *Manager) acceptControl(c *conn, h hello) {
	ctx, cancel := context.WithTimeout(m.ctx, patience(h))
	defer cancel()
	a := m.newAttempt(ctx, c)
	defer a.finish()
	a.address, a.nonce = c.RemoteAddr().String(), Nonce(h.Nonce)
	if no := a.meetPeer(h); no != nil {
		m.failed(h.ClusterID, "refused a link", no.At(h.ClusterID, a.address))
		_ = c.refuse(refusalOf(no.Code, "%s", no.Cause))
		return
	}
	if a.peer == m.incarnation {
		m.acceptSelf(a)
		return
	}
	err := a.accept()
	if err == nil || m.ctx.Err() != nil || errors.Is(err, errSuperseded) || isAlreadyLink(err) {
		return
	}
	m.failed(h.ClusterID, "a handshake that the peer began failed", a.explain(err))
}

// acceptSelf answers this engine's own dial, which needs no more than to see who answers.
func (m *Manager) acceptSelf(a *attempt) {
	if a.answer() == nil {
		_ = skip(a.control, 1) // until the other end closes
	}
}

func isAlreadyLink(err error) bool {
	var no *refused
	return errors.As(err, &no) && no.code == status.AlreadyLink
}

// patience bounds a handshake, or an unlink, that the peer began.
func patience(h hello) time.Duration {
	if h.PatienceMillis == 0 {
		return defaultPatience
	}
	return time.Duration(min(h.PatienceMillis, uint64(maxPatience.Milliseconds()))) * time.Millisecond
}

// accept leads the handshake on the acceptor's side to an installed link.
func (a *attempt) accept() error {
	m := a.m
	a.pair = m.acquirePair(a.peer)
	// From the answer on, data connections and the proof may come at any time.
	waiting := m.expect(a.nonce, a.peer, a.theirs.DataConnections)
	if waiting == nil {
		return errors.New("nonce is in use")
	}
	defer m.unexpect(a.nonce)
	proof := m.expectProof(a.nonce)
	defer proof.drop()
	if err := a.answer(); err != nil {
		return err
	}
	if err := a.choose(); err != nil {
		return err
	}
	err := a.acceptLink(waiting, proof)
	if err != nil && !a.installed {
		_ = a.send(frameRefuse, refusalOf(status.LinkFailed, "%s", status.From(err, "").Cause)) // as far as it gets
	}
	return err
}

func (a *attempt) answer() error {
	_, err := a.control.Write(appendBlock(ourPreamble(intentControl).append(nil), a.hello()))
	return err
}

// acceptLink is what the acceptor does behind GO.
func (a *attempt) acceptLink(waiting *pending, proof *proof) error {
	var theirs ready
	if err := readFrame(a.control, frameReady, &theirs); err != nil {
		return err
	}
	select {
	case <-waiting.complete:
	case <-a.ctx.Done():
		return fmt.Errorf("data connections are missing: %w", context.Cause(a.ctx))
	}
	witness, reason := proof.check(theirs)
	l, err := a.install(a.m.takePending(a.nonce), witness, reason)
	if err != nil {
		return err
	}
	// Installed before the answer: when the dialer's call returns, both ends have the link.
	// Started before it too, so that the end of the link ends a write that finds no room.
	l.start()
	if err = a.send(frameReady, ready{SameHost: l.peer.SameHost, Reason: l.peer.SameHostReason}); err != nil {
		l.Fail(err)
	}
	return err
}

// proof is what the acceptor's door saw of the dialer.
type proof struct {
	claim  func() (Witness, error) // nil once claimed, or without a door
	reason string                  // why there is no door
}

func (m *Manager) expectProof(nonce Nonce) *proof {
	m.mu.Lock()
	door, reason := m.door, m.doorError
	m.mu.Unlock()
	if door == nil {
		if reason == "" {
			reason = "this network has no proof of a shared host"
		}
		return &proof{reason: reason}
	}
	return &proof{claim: door.Expect(nonce)}
}

// check returns the witness when both ends have seen the proof.
func (p *proof) check(theirs ready) (Witness, string) {
	if p.claim == nil {
		return nil, p.reason
	}
	witness, err := p.claim()
	p.claim = nil
	switch {
	case !theirs.SameHost:
		if witness != nil {
			witness.Close()
		}
		return nil, printable(theirs.Reason)
	case err != nil:
		return nil, err.Error()
	default:
		return witness, shownBy(witness)
	}
}

func (p *proof) drop() {
	if p.claim != nil {
		p.check(ready{})
	}
}

// shownBy says in words what w shows, and what is missing.
func shownBy(w Witness) string {
	const shown = "the Unix socket of the handshake was reached under the same uid, and the process is watched by its pidfd"
	if err := w.Withheld(); err != nil {
		return shown + "; nothing was handed to the peer: " + printable(err.Error())
	}
	return shown
}
