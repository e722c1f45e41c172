// SPDX-License-Identifier: Apache-2.0

// Package transport holds the interfaces between the engine and the ways to move bytes; each way has a folder of its own.
//
// A transport has two small sides. The initiator's side, [Session], moves the bytes of a request from the peer into local memory. The
// serving side asks an [Owner] what a request means and reads the memory of the [Source] that it gets. A transport never imports
// engine, link or cache: what it needs of them it gets through these interfaces.
package transport

import (
	"context"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

// KeyKind says how a request names the cache that it wants.
type KeyKind uint8

// The kinds of names. A BlocksCacheKey is KeyNormal with the id 2^64-1.
const (
	KeyNormal KeyKind = 1 // (ID, Model): request id and model id
	KeyPrefix KeyKind = 2 // (ID, Model): prefix id and model id
	KeyCache  KeyKind = 3 // (CacheID, Batch)
	// KeyPushed names a cache of the pusher exactly: CacheID, its generation in ID, Batch. It never consumes a key.
	KeyPushed KeyKind = 4
	// KeyRelink names no cache: a push with it asks the peer to make the link of a vendor's library anew, see Relinker.
	KeyRelink KeyKind = 5
)

// Key names a cache of the owner.
type Key struct {
	Kind      KeyKind
	ID, Model uint64
	CacheID   int64
	Batch     uint64 // batch row of a KeyCache; the owner knows the row of the other kinds
}

// Request is one pull: what is wanted, and the shape of the initiator's side, so that both ends can build the same plan (rule 2).
// Plan.SrcBatch and Plan.Whole are filled in on both ends from what the owner resolved.
type Request struct {
	Key   Key
	Plan  plan.Request
	Local plan.Shape
	// Lease has the owner hold the memory until the initiator has confirmed or given up, whether a key is consumed or not. It is for a
	// transport that can't tell whether what it has read still was the cache's, and the owner says so when it confirms.
	Lease bool
}

// Theirs says that the pull serves a push of the peer's. It is the peer's operation and waits for none of ours.
func (r *Request) Theirs() bool { return r.Key.Kind == KeyPushed }

// Local is the initiator's memory: one base address a tensor of Request.Local. The caller holds it for the whole call.
type Local struct {
	Addrs   []uintptr
	Backing mem.Backing // how it may be written
	Memory  Memory      // the one cache whose memory it is; nil: it is of several
}

// Memory is a cache that the caller of a transfer holds.
type Memory interface {
	// Native returns the cache's name in a vendor's library; 0: it has none there.
	Native() int64
	// Detain keeps the memory beyond the call, for a transfer that can't be called off, and has everybody else refused until release.
	Detain() (release func())
}

// Push is one push: a request to the peer to pull from us (rule 1), and the shape of our side, from which the peer's follows.
type Push struct {
	Key        Key          // the destination in the receiver's table; not looked at where Addrs is set
	Addrs      []uint64     // raw destination addresses, one a tensor of Plan.SrcTensors; nil: by Key
	Source     int64        // our cache
	Generation uint64       // of our cache
	Shape      plan.Shape   // of our cache
	Plan       plan.Request // Src: ours, Dst: the receiver's; Size is not looked at: whole rows are pushed
	BlockBytes uint64       // bytes of a destination block as the caller says; 0: not said
}

// Session moves bytes over one link. Its methods may be called from many goroutines.
type Session interface {
	// Pull copies what req names into local and returns nil only when every byte of a live generation has arrived and, where the
	// pull consumes its key, the owner has acknowledged it (or the link died in that moment). It ends when ctx ends, with Timeout for
	// a deadline and Failed for a cancel; when it has returned, nothing of it writes into local any more (rule 4).
	Pull(ctx context.Context, req *Request, local Local) error
	// Push has the peer pull what push says, and returns nil only when the peer has all of it. It ends when ctx ends, as Pull does, but
	// not before the peer has confirmed that nothing of it is in flight any more: where that takes more than a second it is Timeout,
	// whatever ended ctx, and later pulls and pushes of this session wait for the peer's answer first.
	Push(ctx context.Context, push *Push) error
	// Close ends every operation with cause, drops every lease of the peer and returns when no goroutine of the session is left.
	Close(cause error)
	// Idle returns a channel that is closed as soon as no operation, own or served, is under way; at once if there is none.
	Idle() <-chan struct{}
}

// Beginner is a session that can begin a pull on one goroutine and finish it on another, so that a caller who may not wait long begins
// it where it stands.
type Beginner interface {
	// Begin starts what Pull does, with a deadline (zero: none) that the owner is told. req and local are the operation's until it is
	// finished. Errors are those of Pull. A nil Operation says that it can't begin without waiting: Pull does it.
	Begin(deadline time.Time, req *Request, local Local) (Operation, error)
}

// Relinker is a session with a link of a vendor's library beside its own, which the end that dialed makes.
type Relinker interface {
	// Relink makes that link anew. It ends when ctx ends.
	Relink(ctx context.Context) error
}

// Explainer is a session that has something to say of how it works.
type Explainer interface {
	// Explain returns lines for explain. It never blocks.
	Explain() []string
}

// Operation is a pull under way. Advance may be called any number of times, then Finish exactly once; the two never at once.
type Operation interface {
	// Advance works on the operation, or waits for it, on the calling goroutine, for about wait at most. True: it has ended, nothing
	// writes into local memory any more, and Finish does not wait for the peer.
	Advance(wait time.Duration) bool
	// Finish waits for the rest of the operation, which ends when ctx ends, and returns as Pull does.
	Finish(ctx context.Context) error
}

// Owner is the serving side's lookup into the owner's table.
type Owner interface {
	// Open resolves a peer's request and holds what it found until Done or Drop.
	// Errors are *status.Error: CacheNotExist, ParamInvalid.
	Open(req *Request) (Source, error)
}

// Receiver is the serving side of pushes.
type Receiver interface {
	// Receive pulls what a peer's push says into our memory, and returns when it is there, or when nothing of it is in flight any more.
	// It ends when ctx ends. push is the receiver's. Errors are *status.Error.
	Receive(ctx context.Context, push *Push) error
}

// Server is all of the serving side.
type Server interface {
	Owner
	Receiver
}

// Source is a cache that is held for one operation of a peer.
type Source interface {
	Shape() plan.Shape
	Generation() uint64
	Batch() uint64                 // the resolved batch row
	Whole() bool                   // all of that row moves, whatever the request says
	Native() int64                 // the cache's name in a vendor's library; 0: it has none there
	Consumes() bool                // the key is released when the initiator confirms: this source is a lease
	Address(tensor uint32) uintptr // base of a tensor
	OnDevice() bool                // only the device's copies may read there
	Acquire() bool                 // before each system call on the memory; false once it was withdrawn
	Release()                      // after it
	Done(tensors plan.Range) bool  // the initiator confirmed these tensors; false: the cache was withdrawn for good before
	Drop()                         // ended otherwise: nothing is released
}

// MaxWait bounds every call that may touch a caller's memory: a cancel is seen within it (100 ms, design: no system call on a
// caller's memory lasts longer).
const MaxWaitMillis = 100

// Conn is one data connection: a reliable, ordered stream of bytes between two engines. One goroutine may receive while another
// sends. Errors other than EFAULT end the connection; EFAULT (unix.EFAULT) means that the span at which the count stopped is not
// accessible, and that nothing of the stream was lost.
type Conn interface {
	// Receive reads at least one byte into spans, in order, and returns how many. It returns 0 and nil when nothing came for
	// MaxWaitMillis, and io.EOF when the peer has closed.
	Receive(spans []mem.Span) (int, error)
	// TryReceive is Receive that never waits: 0 and nil when nothing is there.
	TryReceive(spans []mem.Span) (int, error)
	// Send writes at least one byte from spans and returns how many. It returns 0 and nil when nothing could be written for
	// MaxWaitMillis.
	Send(spans []mem.Span) (int, error)
	// TrySend is Send that never waits.
	TrySend(spans []mem.Span) (int, error)
	// Park waits, without a thread of its own, until there is something to receive, the peer has closed, or Shutdown was called.
	Park()
	// Shutdown ends the stream in both directions and makes every call on it return soon, now and later. Safe at any time.
	Shutdown()
	// Close releases the connection. No call may be under way.
	Close() error
	// Path says in words what the connection runs over, for explain: "127.0.0.1:4000 -> 127.0.0.1:5000, cubic".
	Path() string
}
