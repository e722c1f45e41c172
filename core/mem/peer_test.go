// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

// partVariable tells a second process of a test, which is this program again, which part it plays.
const partVariable = "MEM_TEST_PART"

// parts says what peers do. Each says something when it is ready, and ends at the latest with its standard input.
var parts = map[string]func(orders *bufio.Scanner){
	"idle":   func(*bufio.Scanner) { say("idle") },
	"vow":    playVow,
	"churn":  playChurn,
	"old":    playOld,
	"many":   playMany,
	"pages":  playPages,
	"memory": playMemory,
	"reader": playReader,
}

func init() {
	part := os.Getenv(partVariable)
	if part == "" {
		return
	}
	orders := bufio.NewScanner(os.Stdin)
	parts[part](orders)
	for orders.Scan() {
	}
	os.Exit(0)
}

// say and must are for the parts: there is no testing.T.
func say(words ...any) { fmt.Println(words...) }

func must[T any](value T, err error) T {
	mustNot(err)
	return value
}

func mustNot(err error) {
	if err != nil {
		say("failed:", err)
		os.Exit(1)
	}
}

// peer is a second process.
type peer struct {
	t      testing.TB
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	waited bool
}

// start starts a peer with a part to play, and ends it with the test.
func start(t testing.TB, part string, configure ...func(*exec.Cmd)) *peer {
	t.Helper()
	p := &peer{t: t, cmd: exec.Command("/proc/self/exe")} // also another user may execute that
	p.cmd.Env = append(os.Environ(), partVariable+"="+part)
	p.cmd.Stderr = os.Stderr
	for _, c := range configure {
		c(p.cmd)
	}
	var err error
	p.in, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	p.out = bufio.NewScanner(out)
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() { p.end(unix.SIGKILL) })
	return p
}

func (p *peer) pid() int { return p.cmd.Process.Pid }

// tell sends an order.
func (p *peer) tell(order string) {
	p.t.Helper()
	_, err := io.WriteString(p.in, order+"\n")
	require.NoError(p.t, err)
}

// hear returns the words that the peer says next.
func (p *peer) hear() []string {
	p.t.Helper()
	require.True(p.t, p.out.Scan(), "the peer has ended: %v", p.out.Err())
	words := strings.Fields(p.out.Text())
	require.NotEqual(p.t, "failed:", words[0], p.out.Text())
	return words
}

// number reads what say has written of a number.
func (p *peer) number(word string) uint64 {
	n, err := strconv.ParseUint(word, 10, 64)
	require.NoError(p.t, err)
	return n
}

// end sends a signal that ends the peer, or none, and waits until it is gone.
func (p *peer) end(signal syscall.Signal) {
	if p.waited {
		return
	}
	p.waited = true
	if signal != 0 {
		_ = p.cmd.Process.Signal(signal)
	}
	_ = p.cmd.Wait()
	_ = p.in.Close()
}

// mapped maps shared pages of the peer's.
func (p *peer) mapped(fd string, bytes uint64, seals int) *Mapping {
	p.t.Helper()
	file, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%s", p.pid(), fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(p.t, err)
	defer func() { _ = unix.Close(file) }()
	m, err := MapShared(file, bytes, seals)
	require.NoError(p.t, err)
	p.t.Cleanup(func() { require.NoError(p.t, m.Close()) })
	return m
}

// leaves checks that a test leaves no descriptor, mapping or goroutine of this package behind, and no vow. It comes first in a test.
func leaves(t testing.TB) {
	t.Helper()
	files, tracked, maps := testkit.Files(t), listed(&descriptors), testkit.Mappings(t, "/memfd:")
	t.Cleanup(func() {
		require.Equal(t, files, testkit.Files(t), "descriptors are left")
		require.Equal(t, tracked, listed(&descriptors), "tracked descriptors are left")
		require.Equal(t, maps, testkit.Mappings(t, "/memfd:"), "mappings are left")
		require.Empty(t, walk(t), "vows are left")
		requireNoKeeper(t)
	})
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// areaFacts are the lines of smaps about the area at addr, by name.
func areaFacts(t testing.TB, addr uintptr) map[string]string {
	smaps, err := os.ReadFile("/proc/self/smaps")
	require.NoError(t, err)
	facts, found := map[string]string{}, false
	for _, line := range strings.Split(string(smaps), "\n") {
		if a, ok := parseArea([]byte(line + "\n")); ok && strings.Contains(line, "-") {
			found = a.start <= uint64(addr) && uint64(addr) < a.end
			continue
		}
		if name, value, ok := strings.Cut(line, ":"); ok && found {
			facts[name] = strings.TrimSpace(value)
		}
	}
	require.NotEmpty(t, facts)
	return facts
}

// residentKiB is how much of the area at addr this process has entered in its page table.
func residentKiB(t testing.TB, addr uintptr) int {
	kib, err := strconv.Atoi(strings.TrimSuffix(areaFacts(t, addr)["Rss"], " kB"))
	require.NoError(t, err)
	return kib
}
