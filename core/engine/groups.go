// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// GroupMember is an entry of cluster_rank_info.
type GroupMember struct {
	Cluster uint64
	Rank    uint32
}

// UnmarshalJSON reads [cluster id as a decimal string, rank].
func (m *GroupMember) UnmarshalJSON(text []byte) error {
	var pair [2]json.RawMessage
	var id string
	if err := json.Unmarshal(text, &pair); err != nil {
		return err
	}
	if err := errors.Join(json.Unmarshal(pair[0], &id), json.Unmarshal(pair[1], &m.Rank)); err != nil {
		return err
	}
	var err error
	m.Cluster, err = strconv.ParseUint(id, 10, 64)
	return err
}

// GroupState is what query_register_mem_status tells of a group. It is sticky once it is not GroupPreparing.
type GroupState int64

// The states of a group.
const (
	GroupOK        GroupState = 0
	GroupPreparing GroupState = 1
	GroupFailed    GroupState = 2
)

// mostGroups bounds the groups that were not unlinked (spec §7.4).
const mostGroups = 512

var errGroupUnlinked = errors.New("unlinked")

// groups are the communicators of one engine.
type groups struct {
	pending atomic.Int32   // how many are being prepared: looked at by every transfer
	tasks   sync.WaitGroup // their preparations

	mu     sync.Mutex // guards what follows, and the state and stop of each group
	closed bool
	last   uint64 // id
	all    map[uint64]*group
}

// group is one communicator.
type group struct {
	e       *Engine
	name    string
	members []link.Member // by rank
	self    int           // our place in members
	table   *rankTable
	digest  [32]byte
	fresh   map[uint64]bool // clusters that were not linked when the preparation began
	made    map[uint64]bool // those that we have dialed since; guarded by groups.mu

	gathering *link.Gathering // of the preparation at the root

	ctx    context.Context // of the preparation
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the preparation has ended

	state GroupState
	stop  func() // closes the listener; nil: there is none
}

// GroupLink begins to link every member of a group to every other one, and returns the communicator's id. See spec §7.4.
// Errors: ParamInvalid for members, LinkFailed for what is no rank table, FeatureNotEnabled on the directional backend. What goes wrong
// later is in the log and in Explain, and makes the state GroupFailed.
func (e *Engine) GroupLink(name string, members []GroupMember, table string) (uint64, error) {
	if err := e.groupsEnabled(); err != nil {
		return 0, err
	}
	g, err := e.newGroup(name, members, table)
	if err != nil {
		return 0, err
	}
	id, err := e.begin(g)
	if err == nil && e.loopback() {
		<-g.done // no peer is waited for
	}
	return id, err
}

// begin enters a group and begins its preparation.
func (e *Engine) begin(g *group) (uint64, error) {
	s := &e.groups
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return 0, status.New(status.EngineFinalized, status.StageCheck, "engine was finalized")
	case len(s.all) >= mostGroups:
		return 0, status.Newf(status.ParamInvalid, status.StageCheck, "there are %d communicators", mostGroups).Hinting("unlink some")
	}
	for _, m := range g.others() {
		if _, err := e.links.Link(m.Cluster); err != nil {
			g.fresh[m.Cluster] = true
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	timed, stop := context.WithTimeout(ctx, e.options.LinkTotal)
	g.ctx, g.cancel = timed, func(cause error) { cancel(cause); stop() }
	s.last++
	s.all[s.last] = g
	s.pending.Add(1)
	s.tasks.Go(g.run)
	return s.last, nil
}

func (e *Engine) groupsEnabled() error {
	if e.options.Directional {
		return status.New(status.FeatureNotEnabled, status.StageCheck, "the hixl backend has no groups").Hinting("use link_clusters")
	}
	return nil
}

// newGroup checks what link() was given.
func (e *Engine) newGroup(name string, members []GroupMember, text string) (*group, error) {
	g := &group{e: e, name: name, self: -1, fresh: map[uint64]bool{}, made: map[uint64]bool{}, done: make(chan struct{}), state: GroupPreparing}
	for _, m := range members {
		g.members = append(g.members, link.Member(m))
	}
	slices.SortFunc(g.members, func(a, b link.Member) int {
		return cmp.Or(cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.Cluster, b.Cluster))
	})
	if len(g.members) < 2 || len(g.members) > link.MaxMeeting {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "a group of %d members", len(g.members))
	}
	for i, m := range g.members {
		if m.Cluster == e.clusterID {
			g.self = i
		}
		if i > 0 && m.Rank == g.members[i-1].Rank {
			return nil, status.Newf(status.ParamInvalid, status.StageCheck, "two members have rank %d", m.Rank)
		}
	}
	if g.self < 0 {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "cluster %d, which is this engine, is not among the members", e.clusterID)
	}
	var err error
	g.table, err = parseRankTable(text)
	g.digest = sha256.Sum256(fmt.Appendf(nil, "%q %v %q", name, g.members, text))
	return g, err
}

// GroupStatus returns the state of a communicator, NotYetLink for one that does not exist.
func (e *Engine) GroupStatus(comm uint64) (GroupState, error) {
	g, err := e.group(comm)
	if err != nil {
		return 0, err
	}
	e.groups.mu.Lock()
	defer e.groups.mu.Unlock()
	return g.state, nil
}

// GroupUnlink ends a communicator: a running preparation, and our ends of its links, save those that another communicator uses. It
// asks no peer. Errors: NotYetLink for one that does not exist, UnlinkFailed when ctx has ended first.
func (e *Engine) GroupUnlink(ctx context.Context, comm uint64) error {
	g, err := e.group(comm)
	if err != nil {
		return err
	}
	g.cancel(errGroupUnlinked)
	select {
	case <-g.done:
	case <-ctx.Done():
		return status.Newf(status.UnlinkFailed, status.StageClose, "the preparation has not ended: %w", context.Cause(ctx))
	}
	s := &e.groups
	s.mu.Lock()
	if s.all[comm] != g {
		s.mu.Unlock()
		return unknownGroup(comm)
	}
	delete(s.all, comm)
	linked := g.state == GroupOK
	s.mu.Unlock()
	g.close()
	if !linked {
		return nil // what a preparation has made is gone with its failure
	}
	return g.drop(ctx, func(link.Member) bool { return true })
}

func (e *Engine) group(comm uint64) (*group, error) {
	if err := e.groupsEnabled(); err != nil {
		return nil, err
	}
	e.groups.mu.Lock()
	defer e.groups.mu.Unlock()
	if g := e.groups.all[comm]; g != nil {
		return g, nil
	}
	return nil, unknownGroup(comm)
}

func unknownGroup(comm uint64) error {
	return status.Newf(status.NotYetLink, status.StageCheck, "there is no communicator %d", comm)
}

// preparing reports the group without which there would be no link to id, and which is not complete yet (spec §8.5.2 row 8).
func (s *groups) preparing(id uint64) (name string, pending bool) {
	if s.pending.Load() == 0 {
		return "", false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.all {
		if !g.has(id) {
			continue
		}
		if g.state == GroupOK {
			return "", false
		}
		if g.state == GroupPreparing && g.fresh[id] {
			name, pending = g.name, true
		}
	}
	return name, pending
}

// close ends every preparation and every listener.
func (s *groups) close() {
	s.mu.Lock()
	s.closed = true
	all := s.all
	s.all = nil
	s.mu.Unlock()
	for _, g := range all {
		g.cancel(errGroupUnlinked)
	}
	s.tasks.Wait()
	for _, g := range all {
		g.close()
	}
}

// close closes the group's listener.
func (g *group) close() {
	g.e.groups.mu.Lock()
	stop := g.stop
	g.stop = nil
	g.e.groups.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (g *group) has(id uint64) bool {
	return slices.ContainsFunc(g.members, func(m link.Member) bool { return m.Cluster == id })
}

// others returns the members beside ourselves.
func (g *group) others() []link.Member {
	return slices.Concat(g.members[:g.self], g.members[g.self+1:])
}

// drop drops our end of the link to each other member that which names, save where another group uses it.
func (g *group) drop(ctx context.Context, which func(link.Member) bool) error {
	var failures error
	for _, m := range g.others() {
		if which(m) && !g.e.groups.uses(m.Cluster, g) {
			failures = errors.Join(failures, g.e.links.Unlink(ctx, m.Cluster, "", true))
		}
	}
	return failures
}

// uses reports that a group other than g has, or is to have, a link to id.
func (s *groups) uses(id uint64, g *group) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.all {
		if other != g && other.state != GroupFailed && other.has(id) {
			return true
		}
	}
	return false
}

// run prepares the group.
func (g *group) run() {
	s := &g.e.groups
	defer close(g.done)
	defer g.cancel(nil)
	defer s.pending.Add(-1)
	err := g.prepare()
	if err == nil {
		s.mu.Lock()
		g.state = GroupOK
		s.mu.Unlock()
		g.e.event(link.Info, fmt.Sprintf("the group %q is linked", g.name), nil)
		return
	}
	g.fail(err)
}

// fail takes back the links that we have dialed, and says why, unless it was asked to end. Those that others have dialed are theirs to take
// back, and a link that was made in another way is nobody's.
func (g *group) fail(cause error) {
	g.close()
	err := g.drop(context.Background(), func(m link.Member) bool { return g.made[m.Cluster] })
	if context.Cause(g.ctx) != errGroupUnlinked {
		text := fmt.Sprintf("the group %q failed", g.name)
		for _, m := range g.others() {
			if _, missing := g.e.links.Link(m.Cluster); missing != nil {
				g.e.links.Remember(m.Cluster, cause)
			}
		}
		g.e.event(link.Error, text, errors.Join(cause, err))
	}
	g.e.groups.mu.Lock()
	g.state = GroupFailed
	g.e.groups.mu.Unlock()
}

func (e *Engine) event(level link.Level, text string, cause error) {
	if e.parts.Event != nil {
		e.parts.Event(link.Event{Level: level, Text: text, Cause: cause})
	}
}

// prepare links this member to every other one.
func (g *group) prepare() error {
	if g.e.loopback() {
		return g.linkBack()
	}
	own, err := g.table.at(g.members[g.self].Rank)
	if err != nil {
		return err
	}
	self := link.Attendee{Cluster: g.e.clusterID, Rank: g.members[g.self].Rank}
	if err := onLocal(own.ips, func(ip string) error { return g.listen(ip, &self) }); err != nil {
		return err
	}
	attendees, err := g.meet(own, self)
	if g.gathering != nil {
		defer g.gathering.Close() // when we have our links, every member has had the roster
	}
	if err != nil {
		return err
	}
	var tasks sync.WaitGroup
	failures := make([]error, len(attendees))
	for i, peer := range attendees {
		if i != g.self {
			tasks.Go(func() { failures[i] = g.join(peer, i < g.self) })
		}
	}
	tasks.Wait()
	for _, failure := range failures {
		if failure != nil {
			return failure // one of several: those of dials are in the log as well
		}
	}
	return nil
}

// linkBack is prepare where this engine stands for every other member.
func (g *group) linkBack() error {
	for _, m := range g.others() {
		if err := g.e.linkBack(m.Cluster); err != nil && status.CodeOf(err) != status.AlreadyLink {
			return err
		}
	}
	return nil
}

// listen opens the listener at which the others reach us.
func (g *group) listen(ip string, self *link.Attendee) error {
	bound, stop, err := g.e.links.ListenBeside(net.JoinHostPort(ip, "0"))
	if err != nil {
		return err
	}
	self.Address = bound
	g.e.groups.mu.Lock()
	defer g.e.groups.mu.Unlock()
	g.stop = stop
	return nil
}

// onLocal calls bind with one address after the other until one can be bound, which only local ones can.
func onLocal(ips []string, bind func(ip string) error) error {
	var failures []string
	for _, ip := range ips {
		err := bind(ip)
		if !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.EAFNOSUPPORT) {
			return err
		}
		failures = append(failures, status.From(err, status.StageResolve).Cause)
	}
	return status.Newf(status.LinkFailed, status.StageResolve, "no address of the own rank is local: %s", strings.Join(failures, "; "))
}

// meet lets the members find each other: at the root, which is the first of them.
func (g *group) meet(own rankPlace, self link.Attendee) ([]link.Attendee, error) {
	meeting := link.Meeting{Name: g.name, Digest: g.digest, Members: g.members}
	root, err := g.table.at(g.members[0].Rank)
	if err != nil {
		return nil, err
	}
	port := strconv.Itoa(int(cmp.Or(g.e.options.RendezvousPort, uint16(defaultRendezvousPort+root.device))))
	if g.self > 0 {
		var addresses []string
		for _, ip := range root.ips {
			addresses = append(addresses, net.JoinHostPort(ip, port))
		}
		return g.e.links.Announce(g.ctx, addresses, meeting, self)
	}
	err = g.tries(func(context.Context) error {
		return onLocal(own.ips, func(ip string) (err error) {
			g.gathering, err = g.e.links.Gather(net.JoinHostPort(ip, port), meeting, self)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return g.gathering.Wait(g.ctx)
}

// join links to one other member: the one with the higher rank dials. A link that lives counts, where it is to the engine that has
// announced itself; the handshake finds out whether it lives at both ends.
func (g *group) join(peer link.Attendee, weDial bool) error {
	if !weDial {
		return g.e.links.Await(g.ctx, peer.Cluster, peer.Incarnation)
	}
	request := link.DialRequest{
		Address: peer.Address, GivenID: peer.Cluster, HasGivenID: true, NameOnly: true, Exact: true, Incarnation: peer.Incarnation,
	}
	return g.tries(func(ctx context.Context) error {
		_, err := g.e.links.Dial(ctx, request)
		switch {
		case status.CodeOf(err) == status.AlreadyLink:
			return nil
		case err == nil:
			g.e.groups.mu.Lock()
			defer g.e.groups.mu.Unlock()
			g.made[peer.Cluster] = true
		}
		return err
	})
}

// tries calls try until it succeeds, but only as often as configured, each time with an equal share of the whole time: one that has
// failed early is repeated when its share is over.
func (g *group) tries(try func(ctx context.Context) error) error {
	share := g.e.options.LinkTotal / time.Duration(g.e.options.LinkTries)
	for left := g.e.options.LinkTries - 1; ; left-- {
		ctx, cancel := context.WithTimeout(g.ctx, share)
		err := try(ctx)
		if err != nil && left > 0 {
			<-ctx.Done()
		}
		cancel()
		if err == nil || left == 0 || g.ctx.Err() != nil {
			return err
		}
	}
}
