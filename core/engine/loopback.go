// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// The loopback fabric: with open.Fabric=loopback a link to any other cluster is made at once, without a peer, and leads back to this
// engine. What a peer would be asked is asked of the own table, by the same code in the same order.

// nameLoopback is the fabric's name among the options, and that of its links' transport for Explain.
const nameLoopback = "loopback"

// loopback says that the engine has the loopback fabric.
func (e *Engine) loopback() bool { return e.options.Loopback }

// standsFor says that the engine itself is what a cluster id means.
func (e *Engine) standsFor(id uint64) bool { return e.loopback() && id != e.clusterID }

// announceLoopback says in the log that no bytes of other clusters will be seen.
func (e *Engine) announceLoopback() {
	if e.loopback() {
		e.event(link.Warning, "open.Fabric is loopback: links to other clusters lead back to this engine, which is meant for tests", nil)
	}
}

// linkBack makes a link to a cluster that the engine stands for. AlreadyLink where there is a live one.
func (e *Engine) linkBack(id uint64) error {
	o := &owner{Engine: e, attached: make(chan struct{})}
	o.session = transport.NewDirect(transport.DirectConfig{
		Control: ownTable{o}, Directory: e.table.Directory(), Reader: ownMemory{e.parts.Device},
	})
	close(o.attached)
	return e.links.LinkBack(id, link.Attached{Session: o.session, Transport: nameLoopback})
}

// ownTable is both ends of a loopback link, and is asked without a connection.
type ownTable struct{ *owner }

// Resolve implements transport.Control.
func (t ownTable) Resolve(ctx context.Context, req *transport.Request) (transport.Resolved, error) {
	if ctx.Err() != nil {
		return transport.Resolved{}, transport.Ended(ctx)
	}
	source, err := t.Open(req)
	if err != nil {
		return transport.Resolved{}, err
	}
	r := transport.Resolved{Generation: source.Generation(), Shape: source.Shape(), Batch: source.Batch(), Whole: source.Whole()}
	if source.Consumes() {
		r.Lease = ownLease{source, req.Plan.SrcTensors}
	} else {
		source.Drop()
	}
	return r, nil
}

// Push implements transport.Control: what is pushed is pulled at once, over the same link.
func (t ownTable) Push(ctx context.Context, push *transport.Push) error { return t.Receive(ctx, push) }

// Unconfirmed implements transport.Control: a push has ended when it returns.
func (ownTable) Unconfirmed() <-chan struct{} { return nil }

// Close implements transport.Control: all that is under way is the session's.
func (ownTable) Close(error) {}

// Idle implements transport.Control.
func (ownTable) Idle() <-chan struct{} { return idle }

// idle is a channel that has been closed.
var idle = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// ownLease is a source that consumes its key.
type ownLease struct {
	source  transport.Source
	tensors plan.Range
}

// Confirm implements transport.Lease.
func (l ownLease) Confirm(context.Context) error {
	l.source.Done(l.tensors)
	return nil
}

// Abandon implements transport.Lease.
func (l ownLease) Abandon() { l.source.Drop() }

// ownMemory reads this process's memory, and its device's. A [transport.Direct] asks for 1 MiB at a time and looks at its context in between.
type ownMemory struct{ device mem.Device }

// Read implements transport.Reader.
func (m ownMemory) Read(_ context.Context, access transport.Access, moves []mem.Move, total uint64) error {
	from := mem.BackingFile
	if access.From == directory.Distant {
		from = mem.BackingDevice
	}
	if from == mem.BackingDevice || access.Into == mem.BackingDevice {
		return mem.CopyBetween(m.device, moves, access.Into, from, 1)
	}
	if access.From == directory.Mapped && access.Into == mem.BackingAnonymous {
		return mem.Stores(total).Copy(moves, 0, total)
	}
	return mem.Kernel.Copy(moves, 0, total) // registered memory may not be there, which a system call answers with an error
}
