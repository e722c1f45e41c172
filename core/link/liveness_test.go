// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

func TestKilledProcessIsDead(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	c := spawn(t, "engine", nil)
	_, err := a.dialTo(c.address)
	require.NoError(t, err)
	l := a.mustLink(2)
	require.True(t, l.Peer().SameHost, l.Peer().SameHostReason)
	require.NoError(t, c.cmd.Process.Signal(syscall.SIGKILL))
	requireDead(t, l, patient)
	require.ErrorContains(t, l.Cause(), "peer died")
	require.NoError(t, a.unlink(2, c.address, false))
}

func TestStoppedProcessOnTheSameHostIsNotDead(t *testing.T) {
	check(t)
	const peerDead = 200 * time.Millisecond
	a := newNode(t, 1, func(c *Config) { c.PeerDead = peerDead })
	c := spawn(t, "engine", nil)
	_, err := a.dialTo(c.address)
	require.NoError(t, err)
	l := a.mustLink(2)
	require.True(t, l.Peer().SameHost, l.Peer().SameHostReason)
	testkit.Stop(t, c.cmd.Process.Pid)
	select {
	case <-l.Dead():
		require.Fail(t, "a stopped peer was taken for dead", "%v", l.Cause())
	case <-time.After(3 * peerDead):
	}
	require.NoError(t, c.cmd.Process.Signal(syscall.SIGCONT))
	require.NoError(t, c.cmd.Process.Signal(syscall.SIGKILL))
	requireDead(t, l, patient)
}

func TestSilentProcessOnAnotherHostIsDead(t *testing.T) {
	check(t)
	const peerDead = 800 * time.Millisecond // a busy machine may not run the child for a while
	a := newNode(t, 1, func(c *Config) { c.PeerDead = peerDead })
	a.prover = nil
	c := spawn(t, "engine", nil)
	_, err := a.dialTo(c.address)
	require.NoError(t, err)
	l := a.mustLink(2)
	require.False(t, l.Peer().SameHost)
	select { // as long as it runs, its pings keep it alive
	case <-l.Dead():
		require.Fail(t, "a peer that runs was taken for dead", "%v", l.Cause())
	case <-time.After(3 * peerDead):
	}
	testkit.Stop(t, c.cmd.Process.Pid)
	requireDead(t, l, patient)
	require.ErrorContains(t, l.Cause(), "silent for 800ms")
}

func TestStalledProcessGivesItsPeersTheTimeThatItLost(t *testing.T) {
	p := &pings{every: 100 * time.Millisecond, limit: 400 * time.Millisecond}
	silent := time.Duration(0)
	for range 3 {
		silent = p.judge(silent, 110*time.Millisecond)
	}
	require.Less(t, silent, p.limit)
	require.Less(t, p.judge(silent, time.Hour), p.limit, "stalled for an hour")
	require.Equal(t, p.limit, p.judge(silent, 110*time.Millisecond))
	p.heard.Store(true)
	require.Zero(t, p.judge(silent, 110*time.Millisecond))
}

func TestPace(t *testing.T) {
	for _, c := range []struct{ ours, theirs, want time.Duration }{
		{0, 0, 0},
		{4 * time.Second, 0, time.Second},
		{0, 8 * time.Second, 2 * time.Second},
		{4 * time.Second, 8 * time.Second, time.Second},
		{8 * time.Second, time.Millisecond, minPingEvery},
	} {
		require.Equal(t, c.want, pace(c.ours, c.theirs))
	}
}

func TestProofOfASharedHost(t *testing.T) {
	check(t)
	token, nonce := tokenOf("positive"), Nonce{1}
	door, err := UnixProver{}.Open(token, Descriptors{}, nil)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	_, err = UnixProver{}.Reach(ctx, token, nonce, Descriptors{}, nil)
	require.Error(t, err, "nobody is expected")
	claim := door.Expect(nonce)
	ours, err := UnixProver{}.Reach(ctx, token, nonce, Descriptors{}, nil)
	require.NoError(t, err)
	theirs, err := claim()
	require.NoError(t, err)
	require.NoError(t, door.Close())
	for _, w := range []Witness{ours, theirs} {
		select {
		case <-w.Dead():
			require.Fail(t, "this process lives")
		default:
		}
	}
	ours.Close()
	select {
	case <-theirs.Dead():
	case <-time.After(patient):
		require.Fail(t, "the other end let go")
	}
	theirs.Close()
	_, err = UnixProver{}.Reach(ctx, token, nonce, Descriptors{}, nil)
	require.Error(t, err, "nobody answers")
}

func TestNoProofAcrossNetworkNamespaces(t *testing.T) {
	needRoot(t)
	check(t)
	c := spawn(t, "door:elsewhere", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	})
	require.Equal(t, "open", c.address)
	_, err := UnixProver{}.Reach(context.Background(), tokenOf("elsewhere"), Nonce{1}, Descriptors{}, nil)
	require.ErrorContains(t, err, "reach the Unix socket")
}

func TestNoProofAcrossUsers(t *testing.T) {
	needRoot(t)
	check(t)
	asOther := func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	}
	c := spawn(t, "door:other user", asOther)
	require.Equal(t, "open", c.address)
	_, err := UnixProver{}.Reach(context.Background(), tokenOf("other user"), Nonce{1}, Descriptors{}, neverAsked(t))
	require.ErrorContains(t, err, "runs under uid 12345")

	door, err := UnixProver{}.Open(tokenOf("our door"), Descriptors{}, neverAsked(t))
	require.NoError(t, err)
	claim := door.Expect(Nonce{1})
	c = spawn(t, "reach:our door", asOther)
	require.Contains(t, c.address, "runs under uid 0")
	_, err = claim()
	require.Error(t, err)
	require.NoError(t, door.Close())
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}
