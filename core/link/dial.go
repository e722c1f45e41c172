// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Dial makes a link with the engine at r.Address and returns the cluster id that it reports. Errors are AlreadyLink, LinkFailed,
// Timeout, ParamInvalid (access modes differ) or Failed (the exchange broke).
func (m *Manager) Dial(ctx context.Context, r DialRequest) (uint64, error) {
	ctx, end, err := m.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	m.mu.Lock()
	since := m.serial
	if old := m.records[r.GivenID]; r.HasGivenID && !r.NameOnly && old != nil && old.link != nil && old.link.lives() {
		m.mu.Unlock()
		failure := status.New(status.AlreadyLink, status.StageCheck, "there is a live link").At(r.GivenID, r.Address)
		m.dialFailed(r, r.GivenID, failure)
		return r.GivenID, failure
	}
	m.mu.Unlock()
	id, failure := m.dial(ctx, r, since)
	if failure != nil {
		m.dialFailed(r, id, failure)
		return id, failure
	}
	if r.HasGivenID && !r.NameOnly && r.GivenID != id {
		m.eventOf(Warning, id, fmt.Sprintf("the engine at %s reports cluster id %d, not %d as given: the link is known as %d",
			r.Address, id, r.GivenID, id), nil)
	}
	return id, nil
}

// dialFailed keeps the failure for Explain. A link that exists is nothing to keep.
func (m *Manager) dialFailed(r DialRequest, id uint64, failure *status.Error) {
	switch {
	case failure.Code == status.AlreadyLink:
		m.eventOf(Info, id, "no new link", failure)
	case r.HasGivenID:
		m.failed(r.GivenID, "link failed", failure)
		if id != 0 && id != r.GivenID {
			m.Remember(id, failure)
		}
	case id != 0:
		m.failed(id, "link failed", failure)
	default:
		m.event(Error, "link failed", failure)
	}
}

// dial does the work of Dial. since is the serial of the newest link when the call began.
func (m *Manager) dial(ctx context.Context, r DialRequest, since uint64) (uint64, *status.Error) {
	raw, err := m.cfg.Network.Dial(ctx, r.Source, r.Address)
	if err != nil {
		e := explainAs(ctx, status.LinkFailed, status.StageDial, fmt.Errorf("connect: %w", err))
		e.Address, e.Peer, e.HasPeer = r.Address, r.GivenID, r.HasGivenID
		return 0, e
	}
	a := m.newAttempt(ctx, m.fds.own(raw))
	defer a.finish()
	a.dialed, a.source, a.address = true, r.Source, r.Address
	rand.Read(a.nonce[:]) // never fails
	if e := a.introduce(); e != nil {
		e.Address, e.Peer, e.HasPeer = r.Address, r.GivenID, r.HasGivenID
		return 0, e
	}
	id := a.theirs.ClusterID
	if no := a.meetPeer(a.theirs); no != nil {
		return id, no.At(id, r.Address)
	}
	if no := r.mismatch(id, a.peer); no != nil {
		return id, no.At(r.GivenID, r.Address)
	}
	if a.peer == m.incarnation {
		return id, m.linkSelf(r.Address, since)
	}
	a.pair = m.acquirePair(a.peer)
	err = a.choose()
	if err == nil {
		err = a.dialLink()
	}
	if isAlreadyLink(err) && a.linkedSince(since) {
		return id, nil
	}
	if err != nil {
		return id, a.explain(err)
	}
	return id, nil
}

// mismatch says why whoever has answered is not the engine that an exact request means.
func (r DialRequest) mismatch(id uint64, peer Incarnation) *status.Error {
	switch {
	case !r.Exact:
		return nil
	case id != r.GivenID:
		return status.Newf(status.LinkFailed, status.StageHandshake, "the engine that answers reports cluster id %d", id)
	case peer != r.Incarnation:
		return status.New(status.LinkFailed, status.StageHandshake, "the engine that answers is another one than had announced itself")
	}
	return nil
}

// introduce exchanges the hellos.
func (a *attempt) introduce() *status.Error {
	_, err := a.control.Write(appendBlock(ourPreamble(intentControl).append(nil), a.hello()))
	var pre preamble
	if err == nil {
		pre, err = readAnswer(a.control, intentControl)
	}
	if err == nil {
		a.theirs, err = readHello(a.control, intentControl)
	}
	if err == nil && Nonce(a.theirs.Nonce) != a.nonce {
		err = errNotOurs
	}
	if err == nil {
		return nil
	}
	if pre.major != 0 && pre.major != major {
		a.m.event(Warning, "can not link with "+a.address, err)
	}
	return explainAs(a.ctx, status.LinkFailed, status.StageHandshake, fmt.Errorf("no hello from the peer: %w", err))
}

// readAnswer reads the preamble with which the acceptor answers one of intent i.
func readAnswer(c *conn, i intent) (preamble, error) {
	pre, err := readPreamble(c)
	if err != nil {
		return pre, noEOF(err)
	}
	switch {
	case pre.intent == intentRefuse:
		var no refusal
		if err := readBlock(c, &no); err != nil {
			return pre, noEOF(err)
		}
		return pre, no.asError()
	case pre.major != major:
		return pre, fmt.Errorf("peer speaks version %d.%d of the protocol, this engine %d.%d", pre.major, pre.minor, major, minor)
	case pre.intent != i:
		return pre, errNotOurs
	}
	return pre, nil
}

// dialLink is what the dialer does behind GO.
func (a *attempt) dialLink() error {
	witness, reason := a.prove()
	data, err := a.dialData(witness != nil)
	if err != nil {
		if witness != nil {
			witness.Close()
		}
		return err
	}
	answer, err := a.exchangeReady(ready{SameHost: witness != nil, Reason: reason})
	if witness != nil && (err != nil || !answer.SameHost) {
		witness.Close()
		witness, reason = nil, printable(answer.Reason)
	}
	if err != nil {
		closeAll(data)
		return err
	}
	l, err := a.install(data, witness, reason)
	if err != nil {
		return err
	}
	l.start()
	return nil
}

func (a *attempt) exchangeReady(ours ready) (theirs ready, err error) {
	if err := a.send(frameReady, ours); err != nil {
		return ready{}, err
	}
	return theirs, readFrame(a.control, frameReady, &theirs)
}

// prove tries the proof of a shared host; without it, it says why.
func (a *attempt) prove() (Witness, string) {
	if a.m.prover == nil {
		return nil, "this network has no proof of a shared host"
	}
	if len(a.theirs.Token) == 0 {
		return nil, "the peer has no door for a proof of a shared host"
	}
	ctx, cancel := context.WithTimeout(a.ctx, proofTimeout)
	defer cancel()
	witness, err := a.m.prover.Reach(ctx, Token(a.theirs.Token), a.nonce, a.m.fds, a.m.cfg.Gift)
	if err != nil {
		return nil, err.Error()
	}
	return witness, shownBy(witness)
}

// dialData makes the data connections, all at once and all or none. sameHost: that was shown.
func (a *attempt) dialData(sameHost bool) ([]*conn, error) {
	dial := a.dataDialer(sameHost)
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	conns := make([]*conn, a.m.cfg.DataConnections)
	var first error
	var once sync.Once
	var tasks sync.WaitGroup
	for i := range conns {
		tasks.Go(func() {
			c, err := a.dialDatum(ctx, uint32(i), dial)
			if err != nil {
				once.Do(func() { first = err })
				cancel()
				return
			}
			conns[i] = c
		})
	}
	tasks.Wait()
	if first != nil {
		closeAll(conns)
		return nil, explainAs(a.ctx, status.LinkFailed, status.StageDial, fmt.Errorf("data connection: %w", first))
	}
	return conns, nil
}

func (a *attempt) dialDatum(ctx context.Context, index uint32, dial func(context.Context) (net.Conn, error)) (*conn, error) {
	raw, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	c := a.m.fds.own(raw)
	unbind := c.bind(ctx)
	h := hello{Incarnation: a.m.incarnation[:], ClusterID: a.m.cfg.ClusterID, Nonce: a.nonce[:], Index: index}
	_, err = c.Write(appendBlock(ourPreamble(intentData).append(nil), h))
	if err == nil {
		_, err = readAnswer(c, intentData)
	}
	if !unbind() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// dataDialer returns what connects for a data connection: within the host where that is wanted and works. That it does not is said once.
func (a *attempt) dataDialer(sameHost bool) func(context.Context) (net.Conn, error) {
	far := func(ctx context.Context) (net.Conn, error) { return a.m.cfg.Network.Dial(ctx, a.source, a.address) }
	if !sameHost || a.m.nearby == nil || len(a.usable) == 0 || a.usable[0] != a.m.cfg.Near {
		return far
	}
	var complain sync.Once
	return func(ctx context.Context) (net.Conn, error) {
		c, err := a.m.nearby.DialData(ctx, Token(a.theirs.Token))
		if err == nil || ctx.Err() != nil {
			return c, err
		}
		complain.Do(func() { a.m.eventOf(Warning, a.theirs.ClusterID, "data connections leave the host's own sockets", err) })
		return far(ctx)
	}
}

func closeAll(conns []*conn) {
	for _, c := range conns {
		if c != nil {
			_ = c.Close()
		}
	}
}

// linkedSince says whether a link with the peer was made after the one with serial since: then the call that began before it has what
// it wanted. A handshake of the two that is nearly through is waited for.
func (a *attempt) linkedSince(since uint64) bool {
	m := a.m
	m.mu.Lock()
	current := a.pair.current
	m.mu.Unlock()
	if current != nil && current != a {
		select {
		case <-current.done:
		case <-a.ctx.Done():
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return a.pair.link != nil && a.pair.link.serial > since
}

// linkSelf records a link to oneself.
func (m *Manager) linkSelf(address string, since uint64) *status.Error {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := m.cfg.ClusterID
	r := m.recordOf(id)
	if r.link != nil && r.link.lives() {
		if r.link.serial > since {
			return nil
		}
		return status.New(status.AlreadyLink, status.StageHandshake, "there is a live link").At(id, address)
	}
	m.serial++
	r.ended = ""
	r.link = &Link{
		manager: m, serial: m.serial, alone: true, dead: make(chan struct{}), gone: make(chan struct{}),
		peer: Peer{ClusterID: id, Incarnation: m.incarnation, Address: address, Dialed: true, SameHost: true,
			SameHostReason: "a link to oneself"},
	}
	r.link.peer.link = r.link
	return nil
}
