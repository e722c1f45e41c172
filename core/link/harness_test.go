// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// patient is longer than anything that works takes on a slow machine.
const patient = 20 * time.Second

func TestMain(m *testing.M) {
	if what := os.Getenv("LINK_TEST_CHILD"); what != "" {
		runChild(what)
		return
	}
	// Go's poller opens descriptors at its first use and keeps them.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		_ = l.Close()
	}
	os.Exit(m.Run())
}

// check fails the test when goroutines or descriptors are left at its end. It comes first in every test.
func check(t *testing.T) {
	t.Helper()
	goroutines, files := runtime.NumGoroutine(), testkit.Descriptors(t)
	t.Cleanup(func() {
		require.Eventually(t, func() bool {
			return runtime.NumGoroutine() <= goroutines+1 && testkit.Descriptors(t) <= files // Eventually runs this on one of its own
		}, patient, time.Millisecond, "goroutines or descriptors are left: %d goroutines before, %d descriptors before", goroutines, files)
	})
}

// testConn is a data connection that only the fake session knows how to use.
type testConn struct{ net.Conn }

func (c *testConn) Receive([]mem.Span) (int, error)    { return 0, io.EOF }
func (c *testConn) TryReceive([]mem.Span) (int, error) { return 0, io.EOF }
func (c *testConn) Send([]mem.Span) (int, error)       { return 0, io.EOF }
func (c *testConn) TrySend([]mem.Span) (int, error)    { return 0, io.EOF }
func (c *testConn) Park()                              {}
func (c *testConn) Shutdown()                          { _ = c.Conn.SetDeadline(past) }
func (c *testConn) Path() string                       { return c.LocalAddr().String() + " -> " + c.RemoteAddr().String() }

// fakeSession reads bytes from its connections and reports when one breaks.
type fakeSession struct {
	peer   Peer
	conns  []transport.Conn
	got    chan byte
	closed chan error
	tasks  sync.WaitGroup

	explain func() []string // or nil

	mu   sync.Mutex
	idle chan struct{}
}

// attach makes a fake session.
func attach(p Peer, conns []transport.Conn) (Attached, error) {
	return Attached{Session: newFakeSession(p, conns), Transport: "tcp"}, nil
}

func newFakeSession(p Peer, conns []transport.Conn) *fakeSession {
	s := &fakeSession{peer: p, conns: conns, got: make(chan byte, 64), closed: make(chan error, 4), idle: make(chan struct{})}
	close(s.idle)
	for _, c := range conns {
		s.tasks.Go(func() {
			var b [1]byte
			for {
				if _, err := c.(*testConn).Read(b[:]); err != nil {
					p.Fail(fmt.Errorf("data connection: %w", err))
					return
				}
				s.got <- b[0]
			}
		})
	}
	return s
}

func (s *fakeSession) Pull(context.Context, *transport.Request, transport.Local) error { return nil }

func (s *fakeSession) Push(context.Context, *transport.Push) error { return nil }

func (s *fakeSession) Close(cause error) {
	for _, c := range s.conns {
		c.Shutdown()
	}
	s.tasks.Wait()
	for _, c := range s.conns {
		_ = c.Close()
	}
	s.closed <- cause
}

func (s *fakeSession) Explain() []string {
	if s.explain == nil {
		return nil
	}
	return s.explain()
}

func (s *fakeSession) Idle() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.idle
}

// work begins an operation; the function that it returns ends it.
func (s *fakeSession) work() (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	idle := make(chan struct{})
	s.idle = idle
	return func() { close(idle) }
}

// testNet is real TCP with hooks.
type testNet struct {
	TCP
	prover Prover
	dial   func(ctx context.Context, source, address string) (net.Conn, error)
}

func (n *testNet) Prover() Prover { return n.prover }

func (n *testNet) Dial(ctx context.Context, source, address string) (net.Conn, error) {
	if n.dial != nil {
		return n.dial(ctx, source, address)
	}
	return n.TCP.Dial(ctx, source, address)
}

// node is an engine as far as link knows one.
type node struct {
	*Manager
	address string
	net     *testNet
	t       *testing.T
	table   table

	mu     sync.Mutex
	events []Event
}

func newNode(t *testing.T, id uint64, change ...func(*Config)) *node {
	n := &node{t: t}
	n.net = &testNet{TCP: TCP{NewData: func(c net.Conn) (transport.Conn, error) { return &testConn{c}, nil }}, prover: UnixProver{}}
	cfg := Config{
		Network: n.net, ClusterID: id, Offers: []string{"tcp"}, DataConnections: 2, PeerDead: 10 * time.Second,
		Track: n.table.track, Untrack: n.table.untrack, Event: n.event, Attach: attach,
	}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	n.Manager, err = NewManager(cfg)
	require.NoError(t, err)
	n.address, err = n.Listen("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { n.stop() })
	return n
}

// stop closes the manager and checks the table of descriptors.
func (n *node) stop() {
	require.NoError(n.t, n.Close())
	require.Empty(n.t, n.table.listed(), "descriptors are left in the table")
	n.table.requireSound(n.t)
}

// table is a table of descriptors that looks for mistakes.
type table struct {
	mu     sync.Mutex
	fds    map[int]bool
	tracks int      // calls of track
	odd    []string // descriptors that were tracked twice, or untracked and never tracked
}

func (t *table) descriptors() Descriptors { return Descriptors{Track: t.track, Untrack: t.untrack} }

func (t *table) track(fd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fds[fd] {
		t.odd = append(t.odd, fmt.Sprintf("%d tracked twice", fd))
	}
	if t.fds == nil {
		t.fds = map[int]bool{}
	}
	t.fds[fd] = true
	t.tracks++
}

func (t *table) untrack(fd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.fds[fd] {
		t.odd = append(t.odd, fmt.Sprintf("%d untracked", fd))
	}
	delete(t.fds, fd)
}

func (t *table) listed() map[int]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.fds)
}

func (t *table) tracked() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tracks
}

func (t *table) requireSound(tb testing.TB) {
	t.mu.Lock()
	defer t.mu.Unlock()
	require.Empty(tb, t.odd)
}

func (n *node) event(e Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
}

// saw says whether an event contains text, in its line or in its cause.
func (n *node) saw(text string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, e := range n.events {
		if strings.Contains(fmt.Sprint(e.Text, e.Cause), text) {
			return true
		}
	}
	return false
}

func (n *node) dialTo(address string) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	return n.Dial(ctx, DialRequest{Address: address})
}

func (n *node) mustDial(to *node) {
	n.t.Helper()
	id, err := n.dialTo(to.address)
	require.NoError(n.t, err)
	require.Equal(n.t, to.cfg.ClusterID, id)
}

func (n *node) mustLink(id uint64) *Link {
	n.t.Helper()
	l, err := n.Link(id)
	require.NoError(n.t, err)
	return l
}

func (n *node) unlink(id uint64, address string, force bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	return n.Unlink(ctx, id, address, force)
}

// decidedBy makes the incarnation of low the lower one.
func decidedBy(low, high *node) {
	low.incarnation[0], high.incarnation[0] = 1, 2
}

// requireJoined checks that a and b have one link and that bytes flow both ways over all its connections.
func requireJoined(t *testing.T, a, b *node) {
	t.Helper()
	la, lb := a.mustLink(b.cfg.ClusterID), b.mustLink(a.cfg.ClusterID)
	require.Equal(t, 1, a.LiveLinks())
	require.Equal(t, 1, b.LiveLinks())
	require.Equal(t, la.number, lb.number)
	require.NotEqual(t, la.Peer().Dialed, lb.Peer().Dialed)
	sa, sb := la.Session().(*fakeSession), lb.Session().(*fakeSession)
	require.Len(t, sb.conns, len(sa.conns))
	for _, way := range [][2]*fakeSession{{sa, sb}, {sb, sa}} {
		for i := range way[0].conns {
			_, err := way[0].conns[i].(*testConn).Write([]byte{byte(i)})
			require.NoError(t, err)
		}
		for range way[0].conns {
			select {
			case <-way[1].got:
			case <-time.After(patient):
				require.Fail(t, "no byte came")
			}
		}
	}
}

func requireDead(t *testing.T, l *Link, within time.Duration) {
	t.Helper()
	select {
	case <-l.Dead():
	case <-time.After(within):
		require.Fail(t, "link lives")
	}
}

// child is another process.
type child struct {
	cmd     *exec.Cmd
	address string // what it printed first
	stdin   io.Closer
}

// spawn runs this test binary as what; prepare may be nil.
func spawn(t *testing.T, what string, prepare func(*exec.Cmd)) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "LINK_TEST_CHILD="+what)
	cmd.Stderr = os.Stderr
	if prepare != nil {
		prepare(cmd)
	}
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	if err := cmd.Start(); err != nil {
		t.Skipf("can not start a child like this: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	return &child{cmd: cmd, address: strings.TrimSpace(line), stdin: in}
}

// runChild is the child's main: an engine that listens, or a door.
func runChild(what string) {
	switch name, arg, _ := strings.Cut(what, ":"); name {
	case "engine":
		runChildEngine(2)
	case "door":
		if _, err := (UnixProver{}).Open(tokenOf(arg), Descriptors{}, giving("from the child")); err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("open")
	case "reach":
		_, err := (UnixProver{}).Reach(context.Background(), tokenOf(arg), Nonce{1}, Descriptors{}, nil)
		fmt.Println(err)
	case "pid":
		w, err := (UnixProver{}).Reach(context.Background(), tokenOf(arg), Nonce{1}, Descriptors{}, nil)
		if err != nil {
			fmt.Println(err)
			break
		}
		fmt.Println("pid", w.Pid())
	case "dial data":
		_, err := (UnixProver{}).DialData(context.Background(), tokenOf(arg))
		fmt.Println(err)
	case "listen data":
		if _, err := (UnixProver{}).ListenData(tokenOf(arg)); err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("open")
	case "intrude":
		fmt.Println(intrude(tokenOf(arg), Nonce{1}))
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent closes it
}

func runChildEngine(id uint64) {
	m, err := NewManager(Config{
		Network:   &TCP{NewData: func(c net.Conn) (transport.Conn, error) { return &testConn{c}, nil }},
		ClusterID: id, Offers: []string{"tcp"}, DataConnections: 2,
		Attach: attach, Gift: giving("from the child", "what the child shares"),
	})
	if err == nil {
		var address string
		if address, err = m.Listen("127.0.0.1:0"); err == nil {
			fmt.Println(address)
			return
		}
	}
	fmt.Println(errors.Join(errors.New("child failed"), err))
}

func tokenOf(text string) (token Token) {
	copy(token[:], text)
	return token
}
