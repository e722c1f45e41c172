// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

const (
	// Whoever speaks the protocol sends a hello at once.
	helloTimeout = 5 * time.Second
	// How long an accepted handshake may take where the end that dialed names no bound, and at most.
	defaultPatience = time.Minute
	maxPatience     = time.Hour
	// The proof of a shared host is one exchange between two processes.
	proofTimeout = time.Second
	// How long a last answer may take to be read.
	drainFor = time.Second
	// Accepted connections that have not said hello, and all that are not part of a link yet. When there are more, the oldest
	// stranger has to go; a full house closes the newcomer.
	maxStrangers  = 256
	maxHandshakes = 1024
	// Out of descriptors, say: try again after a pause.
	acceptPause = 50 * time.Millisecond
	// At most one line about strangers in this time.
	strangerQuiet = 10 * time.Second
	// What is remembered of engines that are gone.
	maxPairs   = 4096
	maxRecords = 4096
)

var errFinalized = errors.New("engine was finalized")

// Manager holds the links of one engine.
type Manager struct {
	cfg         Config
	fds         Descriptors
	prover      Prover
	nearby      Nearby    // nil: all data connections go over the Network
	opening     sync.Once // of the door
	incarnation Incarnation
	token       Token

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup // every goroutine and call

	// mu guards everything below, and the fields of pair, record and Link that say so. It is never held while something is waited
	// for.
	mu         sync.Mutex
	closed     bool
	listening  *listening
	beside     map[*listening]struct{} // further listeners, see ListenBeside
	installed  chan struct{}           // closed, and replaced, when a link is installed
	door       Door
	doorError  string
	pairs      map[Incarnation]*pair
	records    map[uint64]*record
	pending    map[Nonce]*pending
	strangers  strangers // connections that are not part of a link
	complaints complaints
	serial     uint64 // of the link installed last
}

// pair is what is known of the links between this incarnation and another one. Guarded by Manager.mu, slot aside.
type pair struct {
	slot    chan struct{} // of the end that decides: held from GO until the link is installed or has failed
	given   uint64        // number of the last GO that we sent
	obeyed  uint64        // number of the last GO that we followed
	retired uint64        // number of the newest link that we retired
	link    *Link         // the live link, or nil
	last    *Link         // the newest link, live or not: its successor waits until it is gone
	current *attempt      // the handshake that followed the last GO, or nil
	users   int           // handshakes under way: the pair must stay
}

// record is what is known under a cluster id. Guarded by Manager.mu.
type record struct {
	link    *Link // the newest link, live or dead; nil where there was none or it was unlinked
	ended   string
	failure string
}

// listening is an open listener and the goroutine that accepts from it.
type listening struct {
	net.Listener
	near    bool          // for data connections within the host
	stopped chan struct{} // closed by Stop before the listener is
	done    chan struct{}
}

// NewManager draws an incarnation. It opens nothing.
func NewManager(cfg Config) (*Manager, error) {
	if cfg.Network == nil || cfg.Attach == nil {
		return nil, status.New(status.ParamInvalid, status.StageCheck, "link: Network and Attach are required")
	}
	if cfg.DataConnections < 0 || cfg.DataConnections > MaxDataConnections {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "link: %d data connections", cfg.DataConnections)
	}
	if len(cfg.Card) > MaxCardBytes {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "link: a card of %d bytes", len(cfg.Card))
	}
	m := &Manager{
		cfg:     cfg,
		fds:     Descriptors{Track: cfg.Track, Untrack: cfg.Untrack},
		prover:  cfg.Network.Prover(),
		pairs:   map[Incarnation]*pair{},
		records: map[uint64]*record{},
		pending: map[Nonce]*pending{},

		beside: map[*listening]struct{}{}, installed: make(chan struct{}),
	}
	if m.incarnation = cfg.Incarnation; m.incarnation == (Incarnation{}) {
		rand.Read(m.incarnation[:]) // never fails
	}
	rand.Read(m.token[:])
	if cfg.Near != "" {
		m.nearby, _ = m.prover.(Nearby)
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	return m, nil
}

// Incarnation returns the name of this life of the engine.
func (m *Manager) Incarnation() Incarnation { return m.incarnation }

// Listen starts to accept links at address ("ip:port", port 0 for any free one) and returns the bound address.
func (m *Manager) Listen(address string) (string, error) {
	_, end, err := m.begin(context.Background())
	if err != nil {
		return "", err
	}
	defer end()
	if m.ListenAddress() != "" {
		return "", status.New(status.Failed, status.StageCheck, "already listening at "+m.ListenAddress())
	}
	l, err := m.open(address)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	if m.closed || m.listening != nil {
		m.mu.Unlock()
		m.fds.untrack(l.Listener)
		_ = l.Close()
		return "", status.New(status.Failed, status.StageCheck, "already listening, or finalized")
	}
	m.listening = l
	m.tasks.Add(1)
	m.mu.Unlock()
	go m.accept(l)
	return l.Addr().String(), nil
}

// ListenBeside accepts links at a further address, beside that of Listen, until stop is called. It returns the bound address. stop may
// be called once, also after Close.
func (m *Manager) ListenBeside(address string) (bound string, stop func(), err error) {
	_, end, err := m.begin(context.Background())
	if err != nil {
		return "", nil, err
	}
	defer end()
	l, err := m.open(address)
	if err != nil {
		return "", nil, err
	}
	if !m.acceptBeside(l) {
		return "", nil, status.Newf(status.EngineFinalized, status.StageCheck, "%w", errFinalized)
	}
	return l.Addr().String(), func() { m.stopBeside(l) }, nil
}

// open binds address. Whoever calls it accepts from the listener.
func (m *Manager) open(address string) (*listening, error) {
	m.opening.Do(m.openDoor)
	listener, err := m.cfg.Network.Listen(address)
	if err != nil {
		return nil, status.Newf(status.Failed, status.StageCheck, "listen at %s: %w", address, err)
	}
	return m.own(listener), nil
}

func (m *Manager) own(listener net.Listener) *listening {
	m.fds.track(listener)
	return &listening{Listener: listener, stopped: make(chan struct{}), done: make(chan struct{})}
}

// StopListening closes the listener; links that it accepted live on. Without a listener it does nothing.
func (m *Manager) StopListening() error {
	m.mu.Lock()
	l := m.listening
	m.listening = nil
	m.mu.Unlock()
	if l == nil {
		return nil
	}
	return m.halt(l)
}

// stopBeside closes a further listener, unless that was done.
func (m *Manager) stopBeside(l *listening) {
	m.mu.Lock()
	_, open := m.beside[l]
	delete(m.beside, l)
	m.mu.Unlock()
	if !open {
		return
	}
	if err := m.halt(l); err != nil {
		m.event(Warning, "a listener did not close", err)
	}
}

// halt closes a listener and waits for its goroutine.
func (m *Manager) halt(l *listening) error {
	close(l.stopped)
	m.fds.untrack(l.Listener)
	err := l.Close()
	<-l.done
	if err != nil {
		return status.Newf(status.Failed, status.StageClose, "close the listener: %w", err)
	}
	return nil
}

// ListenAddress returns the bound address, "" without a listener.
func (m *Manager) ListenAddress() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listening == nil {
		return ""
	}
	return m.listening.Addr().String()
}

// Link returns the live link to the engine that reports id, or NotYetLink.
func (m *Manager) Link(id uint64) (*Link, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.find(id)
}

// Settled is Link, but waits while the link is being unlinked: until it is gone, or stays after all. Where ctx ends first it returns
// LinkBusy.
func (m *Manager) Settled(ctx context.Context, id uint64) (*Link, error) {
	for {
		m.mu.Lock()
		l, err := m.find(id)
		parting, stays := m.parting(id)
		m.mu.Unlock()
		if parting == nil {
			return l, err
		}
		select {
		case <-stays:
		case <-parting.dead:
		case <-ctx.Done():
			return nil, status.New(status.LinkBusy, status.StageCheck, "the link is being unlinked").At(id, parting.peer.Address)
		}
	}
}

// parting returns the link to id if it lives and is being unlinked, and what is closed when it stays. The caller holds m.mu.
func (m *Manager) parting(id uint64) (l *Link, stays <-chan struct{}) {
	r := m.records[id]
	if r == nil || r.link == nil || !r.link.lives() || r.link.farewell == "" {
		return nil, nil
	}
	return r.link, r.link.stays
}

// find is Link. The caller holds m.mu.
func (m *Manager) find(id uint64) (*Link, error) {
	r := m.records[id]
	why := "never linked"
	if r != nil && r.link != nil {
		if r.link.lives() && r.link.farewell == "" {
			return r.link, nil
		}
		why = r.link.ending()
	} else if r != nil && r.ended != "" {
		why = r.ended
	}
	e := status.New(status.NotYetLink, status.StageCheck, why)
	e.Peer, e.HasPeer = id, true
	return nil, e
}

// Await waits until there is a live link to this incarnation of the engine that reports id. It ends, in an error, when ctx does.
func (m *Manager) Await(ctx context.Context, id uint64, incarnation Incarnation) error {
	ctx, end, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	for {
		m.mu.Lock()
		installed := m.installed
		m.mu.Unlock()
		l, err := m.Link(id)
		if err == nil && l.peer.Incarnation == incarnation {
			return nil
		}
		select {
		case <-installed:
		case <-ctx.Done():
			return explainAs(ctx, status.LinkFailed, status.StageDial, errors.New("peer did not link")).At(id, "")
		}
	}
}

// LivePeers describes the other ends of the links that live.
func (m *Manager) LivePeers() []Peer {
	m.mu.Lock()
	defer m.mu.Unlock()
	var peers []Peer
	for _, r := range m.records {
		if r.link != nil && r.link.lives() {
			peers = append(peers, r.link.peer)
		}
	}
	return peers
}

// LiveLinks counts the links that live, one to oneself included.
func (m *Manager) LiveLinks() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, r := range m.records {
		if r.link != nil && r.link.lives() {
			n++
		}
	}
	return n
}

// Close retires every link, stops listening and waits for every goroutine. It doesn't wait for any peer. Later calls of the manager
// are EngineFinalized.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	door := m.door
	m.door = nil
	beside := slices.Collect(maps.Keys(m.beside))
	var links []*Link
	for _, r := range m.records {
		if r.link != nil {
			links = append(links, r.link)
		}
	}
	m.mu.Unlock()
	m.cancel(errFinalized)
	err := m.StopListening()
	for _, l := range beside {
		m.stopBeside(l)
	}
	for _, l := range links {
		m.setFarewell(l, errFinalized.Error())
		m.kill(l, goodbye(l.peer, errFinalized.Error()))
	}
	if door != nil {
		_ = door.Close()
	}
	m.tasks.Wait()
	return err
}

// begin counts a call, so that Close waits for it, and returns a context that also ends with Close.
func (m *Manager) begin(ctx context.Context) (context.Context, func(), error) {
	if !m.enter() {
		return nil, nil, status.Newf(status.EngineFinalized, status.StageCheck, "%w", errFinalized)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(m.ctx, func() { cancel(errFinalized) })
	return ctx, func() { stop(); cancel(nil); m.tasks.Done() }, nil
}

// enter counts a goroutine or a call; false when the manager is closed.
func (m *Manager) enter() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.tasks.Add(1)
	return true
}

// openDoor starts to answer proofs of a shared host. Without it links are made all the same.
func (m *Manager) openDoor() {
	if m.prover == nil {
		return
	}
	m.listenNear()
	door, err := m.prover.Open(m.token, m.fds, m.cfg.Gift)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil:
		m.doorError = err.Error()
	case m.closed:
		m.mu.Unlock()
		_ = door.Close()
		m.mu.Lock()
	default:
		m.door = door
	}
}

// listenNear lets in data connections within the host. Where that can't be they come over the Network. It comes before the door, whose
// name gives the token away.
func (m *Manager) listenNear() {
	if m.nearby == nil {
		return
	}
	listener, err := m.nearby.ListenData(m.token)
	if err != nil {
		m.event(Warning, "data connections within the host can not come in", err)
		return
	}
	l := m.own(listener)
	l.near = true
	m.acceptBeside(l)
}

// acceptBeside accepts from l until stopBeside or Close; false: the manager is closed, and so is l.
func (m *Manager) acceptBeside(l *listening) bool {
	m.mu.Lock()
	open := !m.closed
	if open {
		m.beside[l] = struct{}{}
		m.tasks.Add(1)
	}
	m.mu.Unlock()
	if !open {
		m.fds.untrack(l.Listener)
		_ = l.Close()
		return false
	}
	go m.accept(l)
	return true
}

// acquirePair returns the pair with peer and keeps it until releasePair.
func (m *Manager) acquirePair(peer Incarnation) *pair {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pairs[peer]
	if p == nil {
		m.forgetPairs()
		p = &pair{slot: make(chan struct{}, 1)}
		m.pairs[peer] = p
	}
	p.users++
	return p
}

func (m *Manager) releasePair(p *pair) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.users--
}

// forgetPairs makes room for a pair. An engine that is forgotten may come back: numbers then start from what it reports.
func (m *Manager) forgetPairs() {
	for peer, p := range m.pairs {
		if len(m.pairs) < maxPairs {
			return
		}
		if p.link == nil && p.users == 0 && (p.last == nil || p.last.isGone()) {
			delete(m.pairs, peer)
		}
	}
}

// recordOf returns the record of id, a new one where there is none. The caller holds m.mu.
func (m *Manager) recordOf(id uint64) *record {
	if r := m.records[id]; r != nil {
		return r
	}
	for old, r := range m.records {
		if len(m.records) < maxRecords {
			break
		}
		if r.link == nil || r.link.isGone() {
			delete(m.records, old)
		}
	}
	r := &record{}
	m.records[id] = r
	return r
}

// event hands a line to the log.
func (m *Manager) event(level Level, text string, cause error) {
	if m.cfg.Event != nil {
		m.cfg.Event(Event{Level: level, Text: text, Cause: cause})
	}
}

func (m *Manager) eventOf(level Level, peer uint64, text string, cause error) {
	if m.cfg.Event != nil {
		m.cfg.Event(Event{Level: level, ClusterID: peer, HasClusterID: true, Text: text, Cause: cause})
	}
}

// pause waits for a while, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
