// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
	"github.com/llm-datadist-open/llm-datadist/core/transport/tcp"
)

// The transport cann: links, keys, leases and errors are the engine's, and a vendor's library moves the bytes. Caches are registered with
// the library when they are made, and its own link is made and dropped with ours.

// nameOf is what the library calls an engine's object. Cluster ids need not differ, incarnations do.
func nameOf(incarnation link.Incarnation) uint64 { return binary.LittleEndian.Uint64(incarnation[:]) }

// openLibrary makes the engine's object of the vendor's library, where there is one and no other transport is required.
func (e *Engine) openLibrary(incarnation link.Incarnation) error {
	required := e.options.required()
	if e.parts.Library == nil {
		if required == nameCANN {
			return status.Newf(status.FeatureNotEnabled, status.StageCheck,
				"open.Transport is cann, and the device %s has no library that moves bytes", e.parts.Device.Name()).
				Hinting("set open.Device to cann, or leave open.Transport out")
		}
		return nil
	}
	if required != "" && required != nameCANN {
		return nil
	}
	library, err := e.parts.Library(nameOf(incarnation))
	if err == nil {
		e.hub = native.NewHub(library)
		e.table.Leaving(e.dismiss)
		return nil
	}
	if required == nameCANN {
		return err
	}
	e.event(link.Warning, "the vendor's library is not offered to peers, which are served over tcp", err)
	return nil
}

// libraryPatience is how long finalize waits for calls of the vendor's library: a little longer than one that has its deadline takes.
const libraryPatience = time.Second

// closeLibrary ends the object, when no session is left.
func (e *Engine) closeLibrary() {
	if e.hub != nil && !e.hub.Close(e.options.SyncTimeout+libraryPatience) {
		e.event(link.Error, "a call of the vendor's library has not returned; its object and the memory that it uses stay until it does", nil)
	}
}

// enroll registers a cache with the library. One that it refuses is streamed.
func (e *Engine) enroll(entry *cache.Entry) {
	if e.hub == nil {
		return
	}
	id, err := e.hub.Register(entry.Shape, entry.Placement == cache.Device, entry.Addrs)
	if err != nil {
		e.event(link.Warning, fmt.Sprintf("cache %d is streamed, since the vendor's library does not register it", entry.ID), err)
		return
	}
	if !entry.Enroll(id) {
		e.dismiss(id)
	}
}

// dismiss takes a cache back from the library.
func (e *Engine) dismiss(id int64) {
	if err := e.hub.Unregister(id); err != nil {
		e.event(link.Warning, "the vendor's library keeps a registration", err)
	}
}

// card is what a peer has to know of our object of the library: link.Config.Card, in CBOR.
type card struct {
	Name uint64 `cbor:"1,keyasint"`
	Port uint16 `cbor:"2,keyasint"`
}

func (e *Engine) card() []byte {
	if e.hub == nil {
		return nil
	}
	text, err := cbor.Marshal(card{e.hub.Name(), e.hub.Port()})
	if err != nil {
		panic(err) // two integers
	}
	return text
}

// attachLibrary makes the session of a link whose bytes the library moves, and the library's own link where we dialed. It takes control over,
// but where it fails.
func (e *Engine) attachLibrary(peer link.Peer, control *tcp.Session) (transport.Session, error) {
	var theirs card
	if err := transport.ReadTerms(peer.Card, &theirs); err != nil {
		return nil, fmt.Errorf("read what the peer says of its object: %w", err)
	}
	if theirs.Name != nameOf(peer.Incarnation) { // under another one's name it would get at that one's link
		return nil, fmt.Errorf("the peer's object is called %#x, which is not of its incarnation", theirs.Name)
	}
	local, err := netip.ParseAddrPort(peer.Local)
	if err != nil {
		return nil, err
	}
	remote, err := netip.ParseAddrPort(peer.Address)
	if err != nil {
		return nil, err
	}
	until := peer.Until
	if e.options.required() != nameCANN {
		until = native.InTime(until)
	}
	session, err := native.NewSession(native.Config{
		Hub: e.hub, Control: control, Device: e.parts.Device, Peer: theirs.Name,
		Remote: netip.AddrPortFrom(remote.Addr().Unmap(), theirs.Port), Local: local.Addr().Unmap(), Dials: peer.Dialed,
	}, until)
	if err != nil {
		return nil, err
	}
	return session, nil
}

// relink does what a peer asks for that has no link of the library's left.
func (o *owner) relink(ctx context.Context) error {
	if relinker, ok := o.session.(transport.Relinker); ok {
		return relinker.Relink(ctx)
	}
	return status.New(status.FeatureNotEnabled, status.StageCheck, "no vendor's library moves the bytes of this link")
}
