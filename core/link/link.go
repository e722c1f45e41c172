// SPDX-License-Identifier: Apache-2.0

// Package link owns the control plane between engines: listen, dial, handshake, liveness, unlink, close.
//
// The nouns are few. A [Manager] belongs to one engine and holds its links. A [Link] joins two incarnations of engines and owns a
// control connection, the proof that both share a host (where there is one) and the [transport.Session] that moves the bytes. A
// [Network] is where connections come from: [TCP] in production, core/transport/fabric in tests. A [Prover] shows what "same host"
// means; names and addresses never do.
//
// It promises that two engines that dial each other at once get exactly one link, that a link which is retired has ended its
// operations before its successor serves, that no lock is held while a peer is waited for, and that whatever a stranger sends costs
// a bounded amount of memory and time. It never looks at a byte of a cache, and it never decides that a peer on the same host is
// dead because it is slow.
package link

import (
	"context"
	"net"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Network is where connections come from.
type Network interface {
	// Listen binds address; port 0 stands for any free one.
	Listen(address string) (net.Listener, error)
	// Dial connects to address, from the local ip source unless that is "". It has no deadline but that of ctx.
	Dial(ctx context.Context, source, address string) (net.Conn, error)
	// Data takes a connection over, behind its handshake, as a data connection; always, also where it returns an error.
	Data(c net.Conn) (transport.Conn, error)
	// Prover returns the proof of a shared host, or nil where there is none.
	Prover() Prover
}

// Token names the place where a Prover answers: 16 random bytes that only travel inside a handshake.
type Token [16]byte

// Nonce names one connection: 16 random bytes, drawn by the end that dials. It becomes the link's name for its data connections and
// for the proof of a shared host.
type Nonce [16]byte

// Incarnation names one life of an engine: 16 random bytes, drawn by NewManager.
type Incarnation = [16]byte

// Descriptors is told of every descriptor that a Prover opens and closes, for fork safety. Its functions may be nil.
type Descriptors struct {
	Track, Untrack func(fd int)
}

// Gift is what an engine hands to a peer that has shown that it shares the host and the uid: at most 1 KiB and 8 descriptors. What
// they mean is the transport's; the link looks at neither.
type Gift struct {
	Bytes []byte
	FDs   []int
}

// Prover shows that two engines share a host (design: "Same host"), never by comparing names or addresses. The end that dialed a link
// reaches for the token in the hello of the other end; the other end learns of it by the nonce of the connection.
//
// With the proof both ends exchange gifts. gift, nil where there is none, is called once for each proof, when the other end is known to
// be trusted (by a door: and expected). It makes descriptors for that proof alone: they are the Prover's, which closes them as soon as
// they are sent, or when they can't be. Where it fails the proof goes on without a gift, and the witness says so.
type Prover interface {
	// Open starts answering for token, until the door is closed.
	Open(token Token, fds Descriptors, gift func() (Gift, error)) (Door, error)
	// Reach shows nonce at the door of token and returns the witness of the engine behind it. It fails when there is no such door on
	// this host, when the door does not expect nonce, when whoever is behind it is not trusted, or when a gift does not arrive whole.
	// It ends when ctx ends.
	Reach(ctx context.Context, token Token, nonce Nonce, fds Descriptors, gift func() (Gift, error)) (Witness, error)
}

// Nearby is a Prover with a way for data connections within the host, beside the Network's. Both ends see to it that the other one runs
// under their uid, as the proof does.
type Nearby interface {
	// ListenData listens for them under token.
	ListenData(token Token) (net.Listener, error)
	// DialData connects to who listens under token. It ends when ctx ends.
	DialData(ctx context.Context, token Token) (net.Conn, error)
}

// Door answers those who reach for its token.
type Door interface {
	// Expect lets in one engine that shows nonce. The function that it returns ends that and returns the witness of the engine that
	// came, or an error that says why there is none; it is called exactly once. When Reach has returned a witness, it has one too.
	Expect(nonce Nonce) (claim func() (Witness, error))
	// Close stops answering and waits for every goroutine of the door; witnesses that were claimed live on.
	Close() error
}

// Witness watches over the peer of a link on the same host, and keeps what the peer handed over. Its methods may be called from many
// goroutines.
type Witness interface {
	// Dead is closed when the peer's process is gone, or has let go of its end.
	Dead() <-chan struct{}
	// Take returns what the peer handed over. The first call passes the ownership of the descriptors, which are then no longer in the
	// table of Descriptors; later calls, and those after Close, return nothing.
	Take() Gift
	// Pid returns the number of the peer's process in our pid namespace, 0 where it has none there.
	Pid() int
	// Withheld says why our own gift was not handed to the peer; nil where it was, or where there was none.
	Withheld() error
	// Close lets go, and closes the descriptors that nobody took. Dead is not closed by it, or may be: nobody looks any more.
	Close()
}

// Level says how loud an event is.
type Level uint8

// The levels of events.
const (
	Info Level = iota + 1
	Warning
	Error
)

// Event is a line for the log.
type Event struct {
	Level        Level
	ClusterID    uint64 // of the peer; meaningful where HasClusterID
	HasClusterID bool
	Text         string
	Cause        error // or nil
}

// Config is what a Manager needs. Network and Attach are required.
type Config struct {
	Network   Network
	ClusterID uint64
	// Incarnation names this life of the engine; zero: NewManager draws one.
	Incarnation Incarnation
	OneSided    bool // access mode; both ends of a link must have the same
	// Offers are the transports that this engine can use, best first; Required is the only one it accepts, "" for any.
	Offers   []string
	Required string
	// DataConnections is how many data connections the end that dials a link makes: 0 to MaxDataConnections.
	DataConnections int
	// Near is the transport whose data connections stay within the host (see Nearby): where it is the best one that both ends can use and
	// the shared host was shown. "": none; all go over the Network.
	Near string
	// PeerDead is how long a peer on another host may be silent. A quarter of it is the time between pings.
	PeerDead time.Duration
	// Track and Untrack keep the table of descriptors that a forked child has to close; nil where nobody keeps one.
	Track, Untrack func(fd int)
	// Gift makes what is handed to a peer on the same host; nil: nothing is. It is called for each proof of a shared host, from many
	// goroutines, and each time makes descriptors anew, read-only where the peer is not to write: the link closes them when they have
	// been sent. Where it fails, the link is made all the same, and Explain shows why nothing was handed over.
	Gift func() (Gift, error)
	// Card is what every peer is told in the handshake, at most MaxCardBytes, for the transports; the link does not look at it.
	Card []byte
	// Attach makes the session of a link that is about to be installed. It takes conns over, also where it returns an error. The
	// session reports a broken data connection with p.Fail, which it may do before Attach has returned. When it fails there is no
	// link, and the call that dialed gets the reason: the acceptor attaches first and refuses where it can't; where the dialer can't,
	// the acceptor's link dies.
	Attach func(p Peer, conns []transport.Conn) (Attached, error)
	// StandsFor says which clusters this engine itself stands for, see LinkBack: there is nobody else to ask to unlink. nil: none.
	StandsFor func(id uint64) bool
	// Event takes lines for the log. It must not block and must not call the Manager. nil: nobody listens.
	Event func(Event)
}

// MaxCardBytes bounds Config.Card.
const MaxCardBytes = 256

// MaxDataConnections bounds the data connections of one link (design: 1 to 16).
const MaxDataConnections = 16

// Attached is what Attach made.
type Attached struct {
	Session   transport.Session // a [transport.Explainer] adds its lines to Explain, also after it was closed
	Transport string            // its name, for Explain
	Rejected  []string          // each better transport, with the reason why it is not used: "shm: the shared host was not shown: ..."
}

// Peer describes the other end of a link.
type Peer struct {
	ClusterID      uint64
	Incarnation    Incarnation
	Address        string    // where it was dialed, or where its connection came from
	Local          string    // this end of the control connection: "ip:port"
	Dialed         bool      // this end dialed
	Until          time.Time // when the call that dialed gives up; zero: never
	Card           []byte    // what the other end says in its Config.Card
	SameHost       bool      // shown, see Prover
	SameHostReason string    // why it was not shown, or how it was
	Witness        Witness   // what shows it, for Take and Pid; the link closes it. nil where it was not shown, and for a link to oneself
	Transports     []string  // what both ends can use, best first; one that is required is the only one

	link *Link
}

// Fail ends the link of which p is the peer, before or after it was installed: see [Link.Fail].
func (p Peer) Fail(cause error) {
	if p.link != nil {
		p.link.Fail(cause)
	}
}

// DialRequest says whom to link with.
type DialRequest struct {
	Address    string // "ip:port"
	Source     string // local ip, or ""
	GivenID    uint64 // the cluster id that the caller expects, where HasGivenID
	HasGivenID bool
	NameOnly   bool // GivenID names the failure in the log and for Explain, and nothing is expected of the peer
	// Exact refuses an engine that reports another id than GivenID, or is another incarnation than Incarnation: LinkFailed.
	Exact       bool
	Incarnation Incarnation
}

// Link is one link. A link to oneself has no connections, and a session only where it goes by the name of another cluster.
type Link struct {
	manager *Manager
	peer    Peer
	number  uint64 // among the links of this pair of incarnations
	serial  uint64 // among the links that this manager installed; 0 before
	alone   bool   // a link to oneself under the own cluster id: it has neither session nor goroutines

	control   *conn // nil for a link to oneself
	session   transport.Session
	transport string   // what the session moves bytes by, for Explain
	rejected  []string // transports, each with the reason, for Explain
	paths     []string // of the data connections, for Explain
	pings     pings

	dead chan struct{} // closed by kill, under manager.mu, when cause is set
	gone chan struct{} // closed when nothing of the link is left

	// Guarded by manager.mu.
	cause    error         // why it is dead; written once, before dead is closed
	farewell string        // why it is about to be retired in good order; "" while it serves
	stays    chan struct{} // closed when a farewell is taken back
}

// ClusterID returns the id that the peer reports of itself.
func (l *Link) ClusterID() uint64 { return l.peer.ClusterID }

// Peer describes the other end.
func (l *Link) Peer() Peer { return l.peer }

// Session moves bytes; nil for a link to oneself under the own cluster id.
func (l *Link) Session() transport.Session { return l.session }

// Dead is closed when the link has died or was retired.
func (l *Link) Dead() <-chan struct{} { return l.dead }

// Cause says why the link is dead: a *status.Error with Failed. It is nil while the link lives.
func (l *Link) Cause() error {
	select {
	case <-l.dead:
		return l.cause
	default:
		return nil
	}
}

// Fail ends the link because of cause: the session calls it when a data connection broke. It does not wait, so that a goroutine for
// which Session.Close waits may call it.
func (l *Link) Fail(cause error) { l.manager.kill(l, peerDied(l.peer, cause)) }
