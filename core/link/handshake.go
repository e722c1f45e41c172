// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// The handshake of a control connection, the same for both ends after the hellos:
//
//	dialer                          acceptor
//	HELLO            ->
//	                 <-             HELLO{retired}
//	VIEW{retired}    ->                                  where the acceptor has the lower incarnation
//	GO{number} or REFUSE, from the end with the lower incarnation: it decides
//	proof of a shared host, over the Unix socket of the acceptor
//	data connections ->                                  each with the nonce of the control connection; see Config.Near
//	READY{same host} ->
//	                                 makes its session, installs the link
//	                 <-              READY{same host}
//	makes its session, installs the link
//
// The end that decides numbers the links of the two incarnations, and holds a slot from GO until the link is installed or has failed.
// Any other handshake of the two waits for that slot, so that of two connections dialed at once one becomes the link and the other
// one is refused with AlreadyLink; or takes over, where the first one fails. A link that the other end has retired (by its view) is
// not in the way of a new one. The other end follows the newest GO, whatever it has.

var errSuperseded = errors.New("another connection of the two engines was chosen")

// attempt is one handshake of a control connection, on either side.
type attempt struct {
	m       *Manager
	ctx     context.Context
	cancel  context.CancelCauseFunc
	control *conn
	unbind  func() bool
	dialed  bool
	source  string
	address string
	nonce   Nonce

	theirs   hello
	peer     Incarnation
	usable   []string // transports
	rejected []string // transports, each with the reason
	pair     *pair    // nil before the hellos were exchanged, and for a link to oneself

	number    uint64 // of the link; 0 before GO
	slot      bool   // the slot of the pair is ours
	installed bool
	done      chan struct{} // closed when nothing of the attempt is left
}

func (m *Manager) newAttempt(ctx context.Context, c *conn) *attempt {
	ctx, cancel := context.WithCancelCause(ctx)
	return &attempt{m: m, ctx: ctx, cancel: cancel, control: c, unbind: c.bind(ctx), done: make(chan struct{})}
}

// finish gives back what the attempt holds. A link that was given a number and never came to be counts as retired.
func (a *attempt) finish() {
	m := a.m
	if a.pair != nil {
		m.mu.Lock()
		if a.number > 0 && !a.installed {
			a.pair.retired = max(a.pair.retired, a.number)
		}
		if a.pair.current == a {
			a.pair.current = nil
		}
		m.mu.Unlock()
		if a.slot {
			<-a.pair.slot
		}
		m.releasePair(a.pair)
	}
	if !a.installed {
		a.unbind()
		_ = a.control.Close()
	}
	a.cancel(nil)
	close(a.done)
}

// meetPeer notes who the peer is and what both ends can do. An error is what the peer is to be refused with.
func (a *attempt) meetPeer(h hello) *status.Error {
	a.theirs, a.peer = h, Incarnation(h.Incarnation)
	ours := a.m.cfg
	if h.OneSided != ours.OneSided {
		return status.Newf(status.ParamInvalid, status.StageHandshake, "access modes differ: cluster %d is %s, cluster %d is %s",
			ours.ClusterID, modeName(ours.OneSided), h.ClusterID, modeName(h.OneSided))
	}
	decider, other := ours.Offers, h.Offers
	if !a.decides() {
		decider, other = other, decider
	}
	a.usable, a.rejected = common(decider, other)
	for _, required := range []string{ours.Required, h.Required} {
		if required == "" {
			continue
		}
		if !slices.Contains(a.usable, required) {
			return status.Newf(status.LinkFailed, status.StageHandshake, "transport %q is required, both ends can use: %s", required,
				listOr(a.usable, "none"))
		}
		a.require(required)
	}
	if len(a.usable) == 0 && len(ours.Offers)+len(h.Offers) > 0 {
		return status.Newf(status.LinkFailed, status.StageHandshake, "no transport in common: one end offers %s, the other %s",
			listOr(decider, "none"), listOr(other, "none"))
	}
	return nil
}

// require leaves only one usable transport.
func (a *attempt) require(name string) {
	for _, other := range a.usable {
		if other != name {
			a.rejected = append(a.rejected, other+": "+name+" is required")
		}
	}
	a.usable = []string{name}
}

// common returns the names that are in both lists, in the order of first, and why each other one is not.
func common(first, second []string) (usable, rejected []string) {
	for _, name := range first {
		if slices.Contains(second, name) {
			usable = append(usable, printable(name))
		} else {
			rejected = append(rejected, printable(name)+": only one end offers it")
		}
	}
	for _, name := range second {
		if !slices.Contains(first, name) {
			rejected = append(rejected, printable(name)+": only one end offers it")
		}
	}
	return usable, rejected
}

func modeName(oneSided bool) string {
	if oneSided {
		return "one-sided"
	}
	return "two-sided"
}

func listOr(names []string, none string) string {
	if len(names) == 0 {
		return none
	}
	return printable(strings.Join(names, ", "))
}

// decides says whether this end chooses the connection that becomes the link.
func (a *attempt) decides() bool { return bytes.Compare(a.m.incarnation[:], a.peer[:]) < 0 }

// hello returns what this end says of itself.
func (a *attempt) hello() hello {
	m := a.m
	h := hello{
		Incarnation: m.incarnation[:], ClusterID: m.cfg.ClusterID, OneSided: m.cfg.OneSided,
		Offers: m.cfg.Offers, Required: m.cfg.Required, Nonce: a.nonce[:],
		PeerDeadMillis: uint64(m.cfg.PeerDead.Milliseconds()), Card: m.cfg.Card,
	}
	if a.dialed {
		h.DataConnections = uint32(m.cfg.DataConnections)
		h.PatienceMillis = patienceOf(a.ctx)
		return h
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.door != nil {
		h.Token = m.token[:]
	}
	if a.pair != nil {
		h.Retired, h.Newest = a.pair.retired, a.pair.obeyed
	}
	return h
}

// patienceOf returns how many milliseconds ctx has left, 0 where it has no deadline.
func patienceOf(ctx context.Context) uint64 {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return uint64(max(time.Until(deadline).Milliseconds(), 1))
}

// choose finds out whether this connection becomes the link.
func (a *attempt) choose() error {
	if a.decides() {
		theirs := view{Retired: a.theirs.Retired, Newest: a.theirs.Newest}
		if !a.dialed {
			theirs = view{}
			if err := readFrame(a.control, frameView, &theirs); err != nil {
				return err
			}
		}
		return a.decide(theirs)
	}
	if a.dialed {
		a.m.mu.Lock()
		ours := view{Retired: a.pair.retired, Newest: a.pair.obeyed}
		a.m.mu.Unlock()
		if err := a.send(frameView, ours); err != nil {
			return err
		}
	}
	var d decision
	if err := readFrame(a.control, frameGo, &d); err != nil {
		return err
	}
	return a.obey(d.Number)
}

// decide waits for its turn and takes this connection, or refuses it because there is a link that the other end has not retired.
func (a *attempt) decide(theirs view) error {
	select {
	case a.pair.slot <- struct{}{}:
		a.slot = true
	case <-a.ctx.Done():
		return context.Cause(a.ctx)
	}
	m := a.m
	m.mu.Lock()
	live, last := a.pair.link, a.pair.last
	m.mu.Unlock()
	if live != nil && theirs.Retired < live.number {
		no := refusalOf(status.AlreadyLink, "there is a link between the two engines")
		_ = a.send(frameRefuse, no)
		return no.asError()
	}
	if live != nil {
		m.retire(live, "the peer dropped the link")
	}
	if last != nil {
		<-last.gone
	}
	m.mu.Lock()
	a.number = max(a.pair.given, theirs.Newest) + 1
	a.pair.given = a.number
	m.mu.Unlock()
	return a.send(frameGo, decision{Number: a.number})
}

// obey follows a GO: whatever came of an earlier one is over.
func (a *attempt) obey(number uint64) error {
	m := a.m
	m.mu.Lock()
	if number <= a.pair.obeyed {
		m.mu.Unlock()
		return errSuperseded
	}
	a.number, a.pair.obeyed = number, number
	earlier := a.pair.current
	a.pair.current = a
	m.mu.Unlock()
	if earlier != nil {
		earlier.cancel(errSuperseded)
		<-earlier.done
	}
	m.mu.Lock()
	last := a.pair.last
	m.mu.Unlock()
	if last != nil {
		m.retire(last, "the peer dropped the link")
	}
	return nil
}

func (a *attempt) send(kind frameKind, v any) error {
	_, err := a.control.Write(appendFrame(nil, kind, encode(v)))
	return err
}

// explain turns the failure of a handshake into what the caller gets.
func (a *attempt) explain(err error) *status.Error {
	return explainAs(a.ctx, status.Failed, status.StageHandshake, fmt.Errorf("control exchange broken: %w", err)).
		At(a.theirs.ClusterID, a.address)
}

// explainAs makes a failure of code, unless ctx had ended: then it is a timeout, or the engine was finalized.
func explainAs(ctx context.Context, code status.Code, stage status.Stage, err error) *status.Error {
	var no *refused
	var own *status.Error
	deadline, bounded := ctx.Deadline()
	switch {
	case errors.Is(context.Cause(ctx), errFinalized):
		return status.Newf(status.EngineFinalized, stage, "%w", errFinalized)
	case errors.Is(context.Cause(ctx), errSuperseded):
		return status.Newf(status.Failed, stage, "%w", errSuperseded)
	case bounded && !time.Now().Before(deadline):
		return status.Newf(status.Timeout, stage, "deadline reached: %w", err)
	case ctx.Err() != nil:
		return status.Newf(status.Failed, stage, "cancelled: %w", err)
	case errors.As(err, &no):
		return status.New(no.code, stage, "refused by the peer: "+no.cause)
	case errors.As(err, &own):
		return own
	}
	return status.Newf(code, stage, "%w", err)
}
