// SPDX-License-Identifier: Apache-2.0

// Package engine ties the parts together: one Engine is one LLMDataDist.
//
// It owns a table of caches, a manager of links and, for each link, the session that moves its bytes. It decides what a documented
// call means in terms of those parts, and in which order it checks; it moves no byte itself. When Close has returned, nothing of the
// engine is left: no goroutine, descriptor or mapping.
package engine

import (
	"crypto/rand"
	"errors"
	"net"
	"strings"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
	"github.com/llm-datadist-open/llm-datadist/core/transport/shm"
	"github.com/llm-datadist-open/llm-datadist/core/transport/tcp"
)

// Parts are what an engine is put together from.
type Parts struct {
	Device  mem.Device   // where DEVICE memory lives
	Network link.Network // where connections come from
	// Sessions makes the session of a link; nil: shm on one host, else tcp.
	Sessions func(peer link.Peer, conns []transport.Conn, server transport.Server) (transport.Session, error)
	// Library makes the engine's object of a vendor's library, under a name that no other engine has; nil: none moves bytes.
	Library func(name uint64) (native.Library, error)
	// Event takes lines for the log; it must not block. nil: nobody listens.
	Event func(link.Event)
}

// Engine is one LLMDataDist. Its methods may be called from many goroutines, except that nothing may be called after Close.
type Engine struct {
	clusterID uint64
	options   Options
	parts     Parts
	table     *cache.Table
	links     *link.Manager
	share     *shm.Share  // nil where shm is not used
	hub       *native.Hub // nil where no vendor's library is used
	groups    groups

	mu    sync.Mutex        // guards what follows
	owned map[uint64]uint64 // links of the directional backend: the id that the caller gave -> the id that the peer reports
}

// sockets is one for all engines: those that meet at a rendezvous address know by it that they share a network.
var sockets = &link.TCP{NewData: tcp.NewConn, Control: tcp.Control}

// TCP returns the network of real sockets.
func TCP() link.Network { return sockets }

// New makes an engine: its pools are reserved and, where the options say so, its listener is bound.
// Errors: OutOfMemory where a pool can't be had, Failed where the address can't be bound, ParamInvalid for options.
func New(clusterID uint64, options Options, parts Parts) (*Engine, error) {
	e := &Engine{clusterID: clusterID, options: options, parts: parts, owned: map[uint64]uint64{}, groups: groups{all: map[uint64]*group{}}}
	var err error
	if e.table, err = cache.NewTable(parts.Device, options.DevicePool, options.HostPool); err != nil {
		return nil, err
	}
	e.announceLoopback()
	incarnation := newIncarnation()
	if err := errors.Join(e.openShare(incarnation), e.openLibrary(incarnation)); err != nil {
		return nil, errors.Join(err, e.closeMemory())
	}
	if e.links, err = link.NewManager(e.linkConfig(incarnation)); err != nil {
		return nil, errors.Join(err, e.closeMemory())
	}
	if options.HasListen {
		if _, err := e.links.Listen(net.JoinHostPort(options.ListenIP, options.ListenPort)); err != nil {
			return nil, errors.Join(err, e.Close())
		}
	}
	return e, nil
}

func newIncarnation() (drawn link.Incarnation) {
	rand.Read(drawn[:]) // never fails
	return drawn
}

func (e *Engine) linkConfig(incarnation link.Incarnation) link.Config {
	return link.Config{
		Network: e.parts.Network, ClusterID: e.clusterID, Incarnation: incarnation, OneSided: e.options.OneSided, Offers: e.offers(),
		Required: e.options.required(), DataConnections: e.options.TCPConnections, Near: nameSHM, PeerDead: e.options.PeerDead, Track: track, Untrack: mem.Untrack,
		Gift: e.gift, Card: e.card(), Attach: e.attach, StandsFor: e.standsFor, Event: e.parts.Event,
	}
}

// Close is finalize: links are retired, the listener stops, memory is given back. It is local and does not wait for a peer.
func (e *Engine) Close() error {
	e.groups.close()
	return errors.Join(e.links.Close(), e.closeMemory())
}

// closeMemory ends what is published before any memory goes.
func (e *Engine) closeMemory() error {
	e.closeLibrary()
	err := e.table.Close()
	if e.share != nil {
		err = errors.Join(err, e.share.Close())
	}
	return err
}

// ListenAddress returns the bound "ip:port", or "" where the engine does not listen.
func (e *Engine) ListenAddress() string { return e.links.ListenAddress() }

// DeviceApart says that the host can't touch DEVICE memory.
func (e *Engine) DeviceApart() bool { return e.parts.Device.Apart() }

// LiveLinks counts the links that live.
func (e *Engine) LiveLinks() int { return e.links.LiveLinks() }

// Remap is remap_registered_memory: peers read what is registered anew with each transfer, so that there is nothing to do.
// Errors: NotYetLink without a live link.
func (e *Engine) Remap() error {
	if e.LiveLinks() == 0 {
		return status.New(status.NotYetLink, status.StageCheck, "there is no live link")
	}
	return nil
}

// Explain tells how the link to a cluster works and why it failed; "" for an id never met.
func (e *Engine) Explain(id uint64) string { return e.links.Explain(e.reported(id)) }

// Stats counts what the engine holds.
func (e *Engine) Stats() cache.Stats { return e.table.Stats() }

// SwitchRole makes the engine listen on address, or stop listening where it is "". See spec §7.8.
// Errors: ExistLink where a link is live, Failed where the address can't be bound, FeatureNotEnabled for another address on the
// directional backend.
func (e *Engine) SwitchRole(address string) error {
	if e.options.Directional {
		if address != "" && address != net.JoinHostPort(e.options.ListenIP, e.options.ListenPort) {
			return status.New(status.FeatureNotEnabled, status.StageCheck, "the hixl backend keeps the listen address of init")
		}
		return nil
	}
	if live := e.links.LiveLinks(); live > 0 {
		return status.Newf(status.ExistLink, status.StageCheck, "%d links are live", live).Hinting("unlink first")
	}
	if address == "" {
		return e.links.StopListening()
	}
	if samePort(address, e.links.ListenAddress()) {
		return nil
	}
	if err := e.links.StopListening(); err != nil {
		return err
	}
	_, err := e.links.Listen(address)
	return err
}

// samePort compares as documented: the port alone decides.
func samePort(a, b string) bool {
	return b != "" && a[strings.LastIndex(a, ":")+1:] == b[strings.LastIndex(b, ":")+1:]
}

// Register enters memory of the caller into the table and returns its id. Nothing is copied or touched.
func (e *Engine) Register(desc cache.Desc, addrs []uintptr, keys []cache.Key, accessible bool) (int64, error) {
	entry, err := e.table.Register(desc, addrs, keys, accessible)
	if err != nil {
		return 0, err
	}
	e.enroll(entry)
	return entry.ID, nil
}

// Allocate takes memory from a pool and returns the cache's id and the address of each tensor.
func (e *Engine) Allocate(desc cache.Desc, keys []cache.Key) (int64, []uintptr, error) {
	entry, err := e.table.Allocate(desc, keys)
	if err != nil {
		return 0, nil, e.allocateFailure(err)
	}
	e.enroll(entry)
	return entry.ID, entry.Addrs, nil
}

// Deallocate gives up the owner's hold on an allocated cache. Unknown and registered ids are fine, outside v1 mode.
func (e *Engine) Deallocate(id int64, blocks bool) error {
	if !e.options.CacheManager {
		return e.deallocateOlder(id)
	}
	return e.table.Deallocate(id, blocks)
}

// RemoveKey unbinds a key. An unknown one is fine.
func (e *Engine) RemoveKey(key cache.Key) error { return e.table.RemoveKey(key) }

// reported translates an id that a caller of the directional backend gave into the id that the peer reports.
func (e *Engine) reported(id uint64) uint64 {
	if !e.options.Directional {
		return id
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if reported, ok := e.owned[id]; ok {
		return reported
	}
	return id
}

// linkTo returns the live link to a cluster.
func (e *Engine) linkTo(id uint64) (*link.Link, error) { return e.linkBy(e.links.Link, id) }

func (e *Engine) linkBy(find func(id uint64) (*link.Link, error), id uint64) (*link.Link, error) {
	if e.options.Directional {
		e.mu.Lock()
		_, ok := e.owned[id]
		e.mu.Unlock()
		if !ok {
			return nil, status.New(status.NotYetLink, status.StageResolve, "this end has not linked to the cluster").
				Hinting("on the hixl backend each end that starts transfers calls link_clusters itself")
		}
	}
	if name, ok := e.groups.preparing(id); ok {
		return nil, status.Newf(status.NotYetLink, status.StageResolve, "the group %q is being prepared", name)
	}
	l, err := find(e.reported(id))
	if err == nil && l.Session() == nil {
		err = status.New(status.ParamInvalid, status.StageCheck, "the link leads to this engine itself, which is no peer of a transfer")
	}
	return l, err
}

// owner answers the requests of one link's peer from the engine's table, and takes its pushes.
type owner struct {
	*Engine
	attached chan struct{}     // closed when the session is known
	session  transport.Session // of the same link: what an old link's peer pushes never comes over a new one
}

// Open implements transport.Owner.
func (o *owner) Open(req *transport.Request) (transport.Source, error) {
	lookup, err := lookupOf(req.Key)
	if err != nil {
		return nil, err
	}
	lookup.OneSided, lookup.BlocksToBlocks, lookup.Exact = o.options.OneSided, len(req.Plan.SrcBlocks) > 0, req.Plan.Exact
	lookup.Lease = req.Lease
	source, err := o.table.Open(lookup)
	if err != nil {
		return nil, err
	}
	return held{source, o.movesWhole(req, source.Entry())}, nil
}

// lookupOf translates how a peer names a cache.
func lookupOf(key transport.Key) (cache.Lookup, error) {
	switch key.Kind {
	case transport.KeyCache:
		// The key is what an id that names no cache means in one-sided mode (spec §8.6).
		return cache.Lookup{ByID: true, CacheID: key.CacheID, Batch: key.Batch, Key: cache.Key{ID: cache.NoID}}, nil
	case transport.KeyPushed:
		if key.CacheID > 0 && key.ID > 0 {
			return cache.Lookup{ByID: true, CacheID: key.CacheID, Generation: key.ID, Batch: key.Batch}, nil
		}
	case transport.KeyNormal, transport.KeyPrefix:
		return cache.Lookup{Key: cache.Key{ID: key.ID, Model: key.Model, Prefix: key.Kind == transport.KeyPrefix}}, nil
	}
	return cache.Lookup{}, status.Newf(status.ParamInvalid, status.StageLookup, "a key of kind %d", key.Kind)
}

// held shows a source of the table to a transport.
type held struct {
	*cache.Source
	whole bool
}

// Whole implements transport.Source.
func (h held) Whole() bool { return h.whole }

// Shape implements transport.Source.
func (h held) Shape() plan.Shape { return h.Entry().Shape }

// Generation implements transport.Source.
func (h held) Generation() uint64 { return h.Entry().Generation }

// Native implements transport.Source.
func (h held) Native() int64 { return h.Entry().Native() }

// Address implements transport.Source.
func (h held) Address(tensor uint32) uintptr { return h.Entry().Addrs[tensor] }
