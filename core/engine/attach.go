// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"strings"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/shm"
	"github.com/llm-datadist-open/llm-datadist/core/transport/tcp"
)

// The transports that an engine offers, best first.
const (
	nameCANN = "cann"
	nameSHM  = "shm"
	nameTCP  = "tcp"
)

// openShare makes what the engine gives to peers on its host, unless it is told not to use shm. Where the machine has no means for that
// the engine does without, which is said in the log; where shm is required that is an error.
func (e *Engine) openShare(incarnation link.Incarnation) error {
	required := e.options.required()
	if e.parts.Sessions != nil || required != "" && required != nameSHM {
		return nil
	}
	if e.parts.Device.Apart() {
		return e.withoutSHM(fmt.Errorf("peers can't read memory of the device %s", e.parts.Device.Name()))
	}
	share, err := shm.NewShare(incarnation, e.table.SharedPools(), e.options.CopyThreads)
	if err == nil {
		e.share = share
		e.table.Announce(share.Publisher())
		return nil
	}
	return e.withoutSHM(err)
}

// withoutSHM says why shm is not used, and whether the engine can do without.
func (e *Engine) withoutSHM(err error) error {
	if e.options.required() == nameSHM {
		return status.Newf(status.Failed, status.StageCheck, "open.Transport is shm, which this engine does not have: %w", err)
	}
	if e.parts.Event != nil {
		e.parts.Event(link.Event{Level: link.Warning, Text: "shm is not offered to peers on this host, which are served over tcp", Cause: err})
	}
	return nil
}

func (e *Engine) offers() (names []string) {
	if e.hub != nil {
		names = append(names, nameCANN)
	}
	if e.share != nil {
		names = append(names, nameSHM)
	}
	return append(names, nameTCP)
}

// gift is what a peer on this host gets.
func (e *Engine) gift() (link.Gift, error) {
	if e.share == nil {
		return link.Gift{}, nil
	}
	text, fds, err := e.share.Gift()
	return link.Gift{Bytes: text, FDs: fds}, err
}

// attach makes the session of a link over the best transport that works here. The data connections carry what it can't.
func (e *Engine) attach(peer link.Peer, conns []transport.Conn) (link.Attached, error) {
	o := &owner{Engine: e, attached: make(chan struct{})}
	attached, err := e.attachBest(peer, conns, o)
	if err == nil {
		o.session = attached.Session
		close(o.attached)
	}
	return attached, err
}

func (e *Engine) attachBest(peer link.Peer, conns []transport.Conn, o *owner) (link.Attached, error) {
	if e.parts.Sessions != nil {
		session, err := e.parts.Sessions(peer, conns, o)
		return link.Attached{Session: session, Transport: nameTCP}, err
	}
	control, err := tcp.NewSession(tcp.Config{Conns: conns, Owner: o, Receiver: o, Device: e.parts.Device, Spin: e.options.Spin, Broken: peer.Fail})
	if err != nil {
		return link.Attached{}, err
	}
	var rejected []string
	for _, name := range peer.Transports {
		var session transport.Session
		switch name {
		case nameCANN:
			session, err = e.attachLibrary(peer, control)
		case nameSHM:
			session, err = e.attachSHM(peer, control)
		case nameTCP:
			session, err = control, nil
		default:
			err = errors.New("this version does not have it")
		}
		if err == nil {
			return link.Attached{Session: session, Transport: name, Rejected: rejected}, nil
		}
		rejected = append(rejected, name+": "+err.Error())
	}
	err = status.New(status.LinkFailed, status.StageHandshake, "no transport works: "+strings.Join(rejected, "; "))
	control.Close(err)
	return link.Attached{}, err
}

// attachSHM maps what the peer has given. It takes control over, but where it fails.
func (e *Engine) attachSHM(peer link.Peer, control *tcp.Session) (transport.Session, error) {
	if peer.Witness == nil {
		return nil, errors.New("the shared host was not shown: " + peer.SameHostReason)
	}
	gift := peer.Witness.Take()
	session, err := shm.NewSession(shm.Config{
		Share: e.share, Control: control, Incarnation: peer.Incarnation, Pid: peer.Witness.Pid(), Text: gift.Bytes, FDs: gift.FDs,
	})
	if err != nil {
		return nil, err
	}
	return session, nil
}

// track keeps a descriptor for forked children. A full table costs only them: their copy of the descriptor stays open.
func track(fd int) { _ = mem.Track(fd) }
