// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

func (p *peer) stop() {
	p.t.Helper()
	testkit.Stop(p.t, p.pid())
}

// playVow vows in the middle of its pages, and does what it is told.
func playVow(orders *bufio.Scanner) {
	p := must(NewPages("llm_datadist test", page))
	at := p.Addr() + 64
	mustNot(Vow(at))
	say(p.FD())
	for orders.Scan() {
		switch orders.Text() {
		case "exit":
			os.Exit(3)
		case "exec":
			become("idle")
		case "fork": // a child that ends at once
			child := must(fork(nil))
			must(unix.Wait4(child, nil, 0, nil))
		case "fork and stay": // a child that stays until its standard input ends
			say(must(fork([]byte{0})))
			continue
		case "unvow":
			Unvow(at)
		}
		say("done")
	}
}

// fork makes a child with a raw system call, as a Python process does by os.fork: it has one thread, in which Go can't go on. The child
// ends at once, or when it has read something into buffer from its standard input.
//
//go:norace
//go:noinline
func fork(buffer []byte) (pid int, err error) {
	pair := [2]uintptr{uintptr(len(buffer)), 0}
	if len(buffer) > 0 {
		pair[1] = addressOf(buffer)
	}
	syscall.ForkLock.Lock()
	child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && child == 0 {
		if pair[0] > 0 {
			unix.RawSyscall(unix.SYS_READ, 0, pair[1], pair[0])
		}
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	syscall.ForkLock.Unlock()
	if errno != 0 {
		return 0, errno
	}
	return int(child), nil
}

func TestAVowIsMarkedWhenItsProcessEnds(t *testing.T) {
	cases := []struct {
		name string
		end  func(p *peer)
	}{
		{"SIGKILL", func(p *peer) { p.end(unix.SIGKILL) }},
		{"SIGSEGV", func(p *peer) { p.end(unix.SIGSEGV) }},
		{"exit", func(p *peer) { p.tell("exit"); p.end(0) }},
		{"exec", func(p *peer) {
			p.tell("exec")
			require.Equal(p.t, []string{"idle"}, p.hear())
		}},
		{"SIGKILL while stopped", func(p *peer) { p.stop(); p.end(unix.SIGKILL) }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			leaves(t)
			p := start(t, "vow", func(c *exec.Cmd) { c.Stderr = nil })
			m := p.mapped(p.hear()[0], page, PagesSeals)
			word := &m.Words()[(64+VowWord)/8]
			require.True(t, Vowed(word.Load()))
			c.end(p)
			require.False(t, Vowed(word.Load()))
			require.EqualValues(t, futexOwnerDied, word.Load())
		})
	}
}

func TestAForkedChildDoesNotHideADeath(t *testing.T) {
	leaves(t)
	require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) // the orphan is waited for here
	t.Cleanup(func() { require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)) })
	p := start(t, "vow")
	m := p.mapped(p.hear()[0], page, PagesSeals)
	p.tell("fork and stay")
	child := int(p.number(p.hear()[0]))
	require.NoError(t, unix.Kill(p.pid(), unix.SIGKILL))
	require.NoError(t, unix.Waitid(unix.P_PID, p.pid(), nil, unix.WEXITED|unix.WNOWAIT, nil))
	require.EqualValues(t, futexOwnerDied, m.Words()[(64+VowWord)/8].Load())
	require.NoError(t, unix.Kill(child, 0), "the child lives on")
	p.end(0)
	_, err := unix.Wait4(child, nil, 0, nil)
	require.NoError(t, err)
}

func TestAVowHoldsWhileItsProcessLives(t *testing.T) {
	leaves(t)
	p := start(t, "vow")
	m := p.mapped(p.hear()[0], page, PagesSeals)
	word := &m.Words()[(64+VowWord)/8]
	for _, order := range []string{"fork", "fork", "nothing"} {
		p.tell(order)
		p.hear()
		require.True(t, Vowed(word.Load()), "after %s", order)
	}
	p.stop()
	require.True(t, Vowed(word.Load()), "a stopped process lives")
	require.NoError(t, unix.Kill(p.pid(), unix.SIGCONT))
	p.tell("unvow")
	p.hear()
	require.Zero(t, word.Load())
	p.end(unix.SIGKILL)
	require.Zero(t, word.Load(), "there was no vow any more")
}

// churnWords is how many vows playChurn has at most.
const churnWords = 50

// playChurn makes vows and takes them back for ever. The first word of its pages counts.
func playChurn(*bufio.Scanner) {
	p := must(NewPages("llm_datadist test", page))
	count := &p.Words()[0]
	say(p.FD())
	var vowed [churnWords]bool
	for {
		i := rand.IntN(churnWords)
		if at := p.Addr() + VowBytes*uintptr(1+i); vowed[i] {
			Unvow(at)
		} else {
			mustNot(Vow(at))
		}
		vowed[i] = !vowed[i]
		count.Add(1)
	}
}

func TestADeathAtAnyInstantLeavesNoVow(t *testing.T) {
	leaves(t)
	rounds := 25
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		p := start(t, "churn")
		m := p.mapped(p.hear()[0], page, PagesSeals)
		words := m.Words()
		for enough := rand.Uint64N(uint64(1 + round*300)); words[0].Load() < enough; {
			runtime.Gosched()
		}
		p.end(unix.SIGKILL)
		for i := range churnWords {
			require.False(t, Vowed(words[2*(1+i)+VowWord/8].Load()), "round %d, word %d", round, i)
		}
	}
}

// playMany makes as many vows as the kernel looks at.
func playMany(*bufio.Scanner) {
	p := must(NewPages("llm_datadist test", (maxVows+1)*VowBytes))
	for i := range uintptr(maxVows) {
		mustNot(Vow(p.Addr() + i*VowBytes))
	}
	if Vow(p.Addr()+maxVows*VowBytes) == nil {
		say("failed:", "one vow too many")
		return
	}
	say(p.FD())
}

func TestAllVowsAreMarked(t *testing.T) {
	leaves(t)
	p := start(t, "many")
	words := p.mapped(p.hear()[0], (maxVows+1)*VowBytes, PagesSeals).Words()
	for i := range maxVows {
		require.True(t, Vowed(words[2*i+1].Load()))
	}
	p.end(unix.SIGKILL)
	for i := range maxVows {
		require.EqualValues(t, futexOwnerDied, words[2*i+1].Load())
	}
}

func TestVowsComeAndGo(t *testing.T) {
	leaves(t)
	p := newPages(t, page)
	words := p.Words()
	a, b, c := p.Addr(), p.Addr()+32, p.Addr()+160
	vowed := func() (out []bool) {
		for _, at := range []uintptr{a, b, c} {
			out = append(out, Vowed(words[(at+VowWord-p.Addr())/8].Load()))
		}
		return out
	}
	Unvow(a)
	for _, order := range [][]uintptr{{a, b, c}, {c, b, a}, {b, a, c}, {b, c, a}} {
		for _, at := range []uintptr{a, b, c} {
			words[(at+VowWord-p.Addr())/8].Store(1 << 40)
			require.NoError(t, Vow(at))
		}
		require.Equal(t, []bool{true, true, true}, vowed())
		require.ErrorIs(t, Vow(b), status.ParamInvalid, "one vow a word")
		require.Contains(t, stacks(), "mem.(*keeper)")
		for i, at := range order {
			Unvow(at)
			Unvow(at)
			require.Zero(t, words[(at+VowWord-p.Addr())/8].Load())
			require.Len(t, walk(t), 2-i)
		}
		vows.Lock()
		require.Nil(t, vows.keeper, "without a vow nobody keeps it")
		vows.Unlock()
		requireNoKeeper(t)
	}
	for _, at := range []uintptr{0, a + 1, a + 4} {
		require.ErrorIs(t, Vow(at), status.ParamInvalid)
	}
}

// requireNoKeeper waits for the last instructions of the goroutine, which come after it was waited for.
func requireNoKeeper(t testing.TB) {
	require.Eventually(t, func() bool { return !strings.Contains(stacks(), "mem.(*keeper)") }, 20*time.Second, time.Millisecond)
}

// walk follows the list as the kernel would.
func walk(t testing.TB) (nodes []uintptr) {
	vows.Lock()
	defer vows.Unlock()
	if vows.keeper == nil {
		return nil
	}
	head := vows.keeper.head
	for at := uintptr(*word(head)); at != head; at = uintptr(*word(at)) {
		require.Less(t, len(nodes), maxVows)
		nodes = append(nodes, at)
	}
	return nodes
}

func TestVowsFromManyGoroutines(t *testing.T) {
	leaves(t)
	p := newPages(t, page)
	var all sync.WaitGroup
	for i := range uintptr(16) {
		all.Go(func() {
			at := p.Addr() + i*VowBytes
			for range 50 {
				require.NoError(t, Vow(at))
				require.True(t, Vowed(p.Words()[2*i+1].Load()))
				Unvow(at)
			}
		})
	}
	all.Wait()
}

func TestTheThreadsOwnListIsPutBack(t *testing.T) {
	leaves(t)
	lists := func() map[int]uintptr {
		threads, err := os.ReadDir("/proc/self/task")
		require.NoError(t, err)
		out := map[int]uintptr{}
		for _, thread := range threads {
			id, err := strconv.Atoi(thread.Name())
			require.NoError(t, err)
			var head, bytes uintptr
			_, _, errno := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, uintptr(id), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&bytes)))
			if errno != unix.ESRCH { // ended meanwhile
				require.Zero(t, errno)
				out[id] = head
			}
		}
		return out
	}
	p := newPages(t, page)
	require.NoError(t, Vow(p.Addr()))
	vows.Lock()
	keeper, head := int(vows.keeper.thread), vows.keeper.head
	vows.Unlock()
	require.Equal(t, head, lists()[keeper])
	Unvow(p.Addr())
	for thread, list := range lists() {
		require.NotEqual(t, head, list, "thread %d", thread)
	}
}

func TestVowsInABubble(t *testing.T) {
	leaves(t)
	p := newPages(t, page)
	for range 2 {
		synctest.Test(t, func(t *testing.T) {
			require.NoError(t, Vow(p.Addr()))
			require.NoError(t, Vow(p.Addr()+VowBytes))
			synctest.Wait()
			Unvow(p.Addr())
			Unvow(p.Addr() + VowBytes)
		})
	}
}

func TestVowed(t *testing.T) {
	for word, want := range map[uint64]bool{
		0:                       false,
		1:                       true,
		1 << 29:                 true,
		1 << 30:                 false, // marked
		1<<30 | 77:              false,
		1 << 31:                 false, // waited for, but nobody's
		1<<31 | 77:              true,
		1 << 32:                 false,
		0xffffffff_00000000 | 5: true,
	} {
		require.Equal(t, want, Vowed(word), "%#x", word)
	}
}
