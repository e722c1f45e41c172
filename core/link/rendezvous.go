// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// The members of a group find each other where one of them, the root, listens for the time that it takes:
//
//	member                          root
//	preamble, announcement ->
//	                        <-      preamble, or a refusal: not yet, or not this group
//	(waits)
//	                        <-      ROSTER, when all members are there; or REFUSE, when the root gives up
//
// A member whose connection ends before all have come has left, and may come again; one that has lost the roster asks again. Nothing is
// kept of whoever is refused, and a place has no more than two connections that are answered.

const (
	// How long a member waits before it announces itself again: at first, and at most.
	leastAnnouncePause = 20 * time.Millisecond
	mostAnnouncePause  = 500 * time.Millisecond
	// MaxMeeting bounds the members of a group, and mostMeetingName the bytes of its name (128 characters at most 4 bytes each).
	MaxMeeting      = 16
	mostMeetingName = 512
	// Connections of one member that are answered at a time: the one that has lost the roster, and the one that asks for it again.
	mostAnswered = 2
)

// Meeting is what the members of a group must agree on.
type Meeting struct {
	Name    string
	Digest  [32]byte // of everything that they must agree on
	Members []Member
}

// Member is one member of a group as every member knows it beforehand.
type Member struct {
	Cluster uint64
	Rank    uint32
}

// Attendee is a member that is there: where it accepts links, and which life of an engine it is.
type Attendee struct {
	Cluster     uint64      `cbor:"1,keyasint"`
	Rank        uint32      `cbor:"2,keyasint"`
	Address     string      `cbor:"3,keyasint"`
	Incarnation Incarnation `cbor:"4,keyasint"`
}

type announcement struct {
	Name     string   `cbor:"1,keyasint"`
	Digest   []byte   `cbor:"2,keyasint"`
	Attendee Attendee `cbor:"3,keyasint"`
}

type roster struct {
	Attendees []Attendee `cbor:"1,keyasint"`
}

// check returns an error unless the roster has the members of meeting, and each an address.
func (r *roster) check(meeting *Meeting) error {
	if len(r.Attendees) != len(meeting.Members) {
		return fmt.Errorf("the roster has %d members, not %d", len(r.Attendees), len(meeting.Members))
	}
	for i, a := range r.Attendees {
		if (Member{a.Cluster, a.Rank}) != meeting.Members[i] {
			return fmt.Errorf("the roster has cluster %d as rank %d", a.Cluster, a.Rank)
		}
		if err := a.check(); err != nil {
			return err
		}
	}
	return nil
}

func (a *Attendee) check() error {
	if _, err := netip.ParseAddrPort(a.Address); err != nil || printable(a.Address) != a.Address { // a zone may be any text
		return fmt.Errorf("cluster %d has no proper address", a.Cluster)
	}
	return nil
}

// Announce tells the root, which is at one of addresses, that self is there, until it has heard who the others are, in the order of
// meeting.Members. It ends, in LinkFailed or Timeout with the last reason, when ctx does.
func (m *Manager) Announce(ctx context.Context, addresses []string, meeting Meeting, self Attendee) ([]Attendee, error) {
	ctx, end, err := m.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	self.Incarnation = m.incarnation
	last := errors.New("nobody was asked")
	for wait := leastAnnouncePause; ; wait = min(2*wait, mostAnnouncePause) {
		for _, address := range addresses {
			attendees, failure := m.announceAt(ctx, address, &meeting, self)
			if failure == nil {
				return attendees, nil
			}
			if ctx.Err() == nil {
				last = fmt.Errorf("announce at %s: %w", address, failure) // the newest that the deadline has not made
			}
		}
		if pause(ctx, wait); ctx.Err() != nil {
			return nil, explainAs(ctx, status.LinkFailed, status.StageDial, fmt.Errorf("the group did not come together: %w", last))
		}
	}
}

func (m *Manager) announceAt(ctx context.Context, address string, meeting *Meeting, self Attendee) ([]Attendee, error) {
	dialing, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	raw, err := m.cfg.Network.Dial(dialing, "", address)
	if err != nil {
		return nil, err
	}
	c := m.fds.own(raw)
	defer func() { _ = c.Close() }()
	err = c.within(ctx, helloTimeout, func() error {
		said := announcement{Name: meeting.Name, Digest: meeting.Digest[:], Attendee: self}
		if _, err := c.Write(appendBlock(ourPreamble(intentAnnounce).append(nil), said)); err != nil {
			return err
		}
		_, err := readAnswer(c, intentAnnounce)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.bind(ctx)()
	var all roster
	if err := readFrame(c, frameRoster, &all); err != nil {
		return nil, noEOF(err)
	}
	return all.Attendees, all.check(meeting)
}

// Gathering is a group that comes together here, at the root.
type Gathering struct {
	hub     *hub
	meeting Meeting
	ctx     context.Context // ends, under hub.mu, when all have come or it is closed: then members get an answer
	end     context.CancelFunc
	seated  sync.WaitGroup // goroutines that serve a member
	full    chan struct{}  // closed when the last member has come

	// Guarded by hub.mu.
	seats    []*Attendee // by the place in meeting.Members; nil: not there
	answered []int       // connections of each
	missing  int
	closed   bool
	heard    string // of somebody who meant this group and does not belong to it
}

// Gather lets the members of a group come together at address. self is the root, which is there. Every group that gathers at one
// address of one network, whichever manager it belongs to, shares a listener: Network must be comparable.
// It returns Failed where the address can't be bound. Without an error Close must follow: as long as the gathering is open, members
// that have not received the roster whole can ask again.
func (m *Manager) Gather(address string, meeting Meeting, self Attendee) (*Gathering, error) {
	self.Incarnation = m.incarnation
	g := newGathering(meeting)
	if place := g.placeOf(&self); place >= 0 {
		g.seats[place] = &self
		g.missing--
	}
	if err := m.joinHub(address, g); err != nil {
		return nil, status.Newf(status.Failed, status.StageCheck, "listen at %s: %w", address, err)
	}
	return g, nil
}

// newGathering makes a gathering to which nobody has come.
func newGathering(meeting Meeting) *Gathering {
	members := len(meeting.Members)
	return &Gathering{
		meeting: meeting, full: make(chan struct{}), seats: make([]*Attendee, members), answered: make([]int, members), missing: members,
	}
}

// Wait waits until all members are there. When ctx ends first the error names who is missing.
func (g *Gathering) Wait(ctx context.Context) ([]Attendee, error) {
	select {
	case <-g.full:
		return g.roster().Attendees, nil
	case <-ctx.Done():
		return nil, explainAs(ctx, status.LinkFailed, status.StageDial, errors.New(g.lack()))
	}
}

// Close ends the gathering: members that still wait hear of it.
func (g *Gathering) Close() {
	g.hub.mu.Lock()
	g.closed = true
	g.end()
	g.hub.mu.Unlock()
	g.seated.Wait()
	g.leaveHub()
}

// Seated counts the members that have come, roots included, to groups that gather in this process. For tests.
func Seated() (seated int) {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	for _, h := range hubs.open {
		h.mu.Lock()
		for _, g := range h.gatherings {
			seated += len(g.seats) - g.missing
		}
		h.mu.Unlock()
	}
	return seated
}

// placeOf returns the index of a among the members, or -1.
func (g *Gathering) placeOf(a *Attendee) int {
	return slices.Index(g.meeting.Members, Member{a.Cluster, a.Rank})
}

// roster returns who is there once all are.
func (g *Gathering) roster() (out roster) {
	for _, a := range g.seats {
		out.Attendees = append(out.Attendees, *a)
	}
	return out
}

// lack says who is missing.
func (g *Gathering) lack() string {
	g.hub.mu.Lock()
	defer g.hub.mu.Unlock()
	var missing []string
	for i, member := range g.meeting.Members {
		if g.seats[i] == nil {
			missing = append(missing, fmt.Sprintf("cluster %d (rank %d)", member.Cluster, member.Rank))
		}
	}
	text := "did not announce itself: " + strings.Join(missing, ", ")
	if g.heard != "" {
		text += "; " + g.heard
	}
	return text
}

// hub is the listener of a rendezvous address.
type hub struct {
	place    hubPlace
	users    int // gatherings; guarded by hubs.mu
	fds      Descriptors
	listener net.Listener
	ctx      context.Context // ends when the last gathering has left
	cancel   context.CancelFunc
	tasks    sync.WaitGroup

	mu         sync.Mutex // guards what follows; never held while something is waited for
	gatherings []*Gathering
	unseated   strangers // connections that no gathering has taken
}

type hubPlace struct {
	network Network
	address string
}

// hubs are the rendezvous listeners of this process: groups of several engines meet at one address.
var hubs = struct {
	mu   sync.Mutex // guards open; held while one is opened or closed, never while a peer is waited for
	open map[hubPlace]*hub
}{open: map[hubPlace]*hub{}}

func (m *Manager) joinHub(address string, g *Gathering) error {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	place := hubPlace{m.cfg.Network, address}
	h := hubs.open[place]
	if h == nil {
		listener, err := m.cfg.Network.Listen(address)
		if err != nil {
			return err
		}
		h = &hub{place: place, fds: m.fds, listener: listener}
		h.fds.track(listener)
		h.ctx, h.cancel = context.WithCancel(context.Background())
		hubs.open[place] = h
		h.tasks.Go(h.accept)
	}
	h.users++
	g.hub = h
	g.ctx, g.end = context.WithCancel(h.ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gatherings = append(h.gatherings, g)
	return nil
}

// leaveHub closes the listener behind the last gathering and then waits for every goroutine, which takes as long as a last answer.
func (g *Gathering) leaveHub() {
	h := g.hub
	h.mu.Lock()
	h.gatherings = slices.DeleteFunc(h.gatherings, func(other *Gathering) bool { return other == g })
	h.mu.Unlock()
	hubs.mu.Lock()
	h.users--
	last := h.users == 0
	if last {
		delete(hubs.open, h.place)
		h.cancel()
		h.fds.untrack(h.listener)
		_ = h.listener.Close()
	}
	hubs.mu.Unlock()
	if last {
		h.tasks.Wait()
	}
}

func (h *hub) accept() {
	h.fds.acceptEach(h.ctx, h.listener, h.ctx.Done(), nil, h.admit)
}

// admit gives c a goroutine, within the bounds that hold for the strangers of an engine's own listener.
func (h *hub) admit(c *conn) {
	h.mu.Lock()
	element, evicted := h.unseated.enter(c)
	h.mu.Unlock()
	if evicted != nil {
		_ = evicted.Close()
	}
	if element == nil {
		_ = c.Close()
		return
	}
	h.tasks.Go(func() {
		defer func() { _ = c.Close() }()
		if g, place := h.receive(c, element); g != nil {
			defer g.leave(place)
			g.serve(c, place)
		}
	})
}

// receive reads an announcement and takes whoever sent it to its place, or answers with a refusal.
func (h *hub) receive(c *conn, element *list.Element) (*Gathering, int) {
	defer func() {
		h.mu.Lock()
		h.unseated.leave()
		h.mu.Unlock()
	}()
	said, err := h.hear(c)
	h.mu.Lock()
	h.unseated.spoke(element)
	h.mu.Unlock()
	if err != nil {
		return nil, 0
	}
	g, place, err := h.seat(said)
	if err != nil {
		_ = c.within(h.ctx, helloTimeout, func() error { return c.refuse(refusalOf(status.LinkFailed, "%v", err)) })
		return nil, 0
	}
	return g, place
}

func (h *hub) hear(c *conn) (said announcement, err error) {
	err = c.within(h.ctx, helloTimeout, func() error {
		pre, err := readPreamble(c)
		if err != nil {
			return err
		}
		if pre.major != major || pre.intent != intentAnnounce {
			_ = c.refuse(refusalOf(status.LinkFailed, "this is a rendezvous address of version %d.%d", major, minor))
			return errNotOurs
		}
		if err := readBlock(c, &said); err != nil {
			return err
		}
		if len(said.Name) > mostMeetingName {
			return errTooLarge
		}
		return said.Attendee.check()
	})
	return said, err
}

// seat finds the group that somebody belongs to. Where several are alike, the first with a free place has it.
func (h *hub) seat(said announcement) (*Gathering, int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	why := "the group is not being prepared here"
	for _, g := range h.gatherings {
		if g.meeting.Name != said.Name {
			continue
		}
		if !bytes.Equal(g.meeting.Digest[:], said.Digest) {
			why = "the group has another map or rank table at rank 0"
			g.heard = fmt.Sprintf("cluster %d announced itself with another map or rank table", said.Attendee.Cluster)
			continue
		}
		place := g.placeOf(&said.Attendee)
		if place < 0 {
			why = fmt.Sprintf("cluster %d is not rank %d of the group", said.Attendee.Cluster, said.Attendee.Rank)
			continue
		}
		again := g.missing == 0 && *g.seats[place] == said.Attendee // the roster has not reached it
		if g.closed || g.seats[place] != nil && !again {
			why = "the place in the group is taken"
			continue
		}
		if again && g.answered[place] >= mostAnswered {
			why = "the member is being told the roster"
			continue
		}
		g.seated.Add(1)
		g.answered[place]++
		if !again {
			g.take(place, &said.Attendee)
		}
		return g, place, nil
	}
	return nil, 0, errors.New(why)
}

// take gives somebody a place. The caller holds hub.mu.
func (g *Gathering) take(place int, a *Attendee) {
	g.seats[place] = a
	if g.missing--; g.missing == 0 {
		close(g.full)
		g.end()
	}
}

// serve lets a member wait and tells it how the gathering has ended. A member that leaves before that gives its place back.
func (g *Gathering) serve(c *conn, place int) {
	err := c.within(g.hub.ctx, helloTimeout, func() error {
		_, err := c.Write(ourPreamble(intentAnnounce).append(nil))
		return err
	})
	if err == nil {
		err = c.waitQuietly(g.ctx)
	}
	answer := g.answer(place, err)
	if answer == nil {
		return
	}
	_ = c.within(g.hub.ctx, drainFor, func() error {
		_, err := c.Write(answer)
		return err
	})
}

// leave ends what seat has begun.
func (g *Gathering) leave(place int) {
	g.hub.mu.Lock()
	g.answered[place]--
	g.hub.mu.Unlock()
	g.seated.Done()
}

// waitQuietly waits until ctx ends, and returns nil then; an error when the other end leaves first, or sends anything.
func (c *conn) waitQuietly(ctx context.Context) error {
	unbind := c.bind(ctx)
	var b [1]byte
	_, err := c.Read(b[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		_ = c.SetDeadline(time.Time{})
		return nil
	}
	unbind()
	return errors.Join(errNotOurs, err)
}

// answer returns what a member is to hear; nil where it has left, and its place is free again unless all had come.
func (g *Gathering) answer(place int, left error) []byte {
	g.hub.mu.Lock()
	defer g.hub.mu.Unlock()
	switch {
	case left != nil && g.missing > 0:
		g.seats[place] = nil
		g.missing++
		return nil
	case left != nil:
		return nil
	case g.missing > 0:
		return appendFrame(nil, frameRefuse, encode(refusalOf(status.LinkFailed, "rank 0 has given the group up")))
	}
	return appendFrame(nil, frameRoster, encode(g.roster()))
}
