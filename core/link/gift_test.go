// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// giving makes gifts: text, and a memfd for each of contents.
func giving(text string, contents ...string) func() (Gift, error) {
	return func() (Gift, error) {
		gift := Gift{Bytes: []byte(text)}
		for _, content := range contents {
			fd, err := unix.MemfdCreate("llm_datadist test", unix.MFD_CLOEXEC)
			if err != nil {
				return gift, err
			}
			gift.FDs = append(gift.FDs, fd)
			if _, err := unix.Write(fd, []byte(content)); err != nil {
				return gift, err
			}
		}
		return gift, nil
	}
}

// mustGive is a gift that is the caller's to close.
func mustGive(t *testing.T, contents ...string) []int {
	gift, err := giving("", contents...)()
	require.NoError(t, err)
	return gift.FDs
}

func neverAsked(t *testing.T) func() (Gift, error) {
	return func() (Gift, error) {
		t.Error("a gift was made for somebody who is not to have one")
		return Gift{}, nil
	}
}

// requireGift checks a gift and closes it.
func requireGift(t *testing.T, gift Gift, text string, contents ...string) {
	t.Helper()
	require.Equal(t, text, string(gift.Bytes))
	require.Len(t, gift.FDs, len(contents))
	for i, fd := range gift.FDs {
		b := make([]byte, 100)
		n, err := unix.Pread(fd, b, 0)
		require.NoError(t, err)
		require.Equal(t, contents[i], string(b[:n]))
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		require.NoError(t, err)
		require.NotZero(t, flags&unix.FD_CLOEXEC)
	}
	closeFDs(gift.FDs)
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// drawToken returns one that nobody else on this machine has.
func drawToken() (token Token) {
	rand.Read(token[:]) // never fails
	return token
}

func soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patient)
}

func TestGiftsGoBothWays(t *testing.T) {
	for name, gifts := range map[string]struct{ dialer, door []string }{
		"none":        {},
		"descriptors": {[]string{"a", "b"}, []string{"c"}},
		"one way":     {nil, []string{"d", "e", "f"}},
		"the most":    {[]string{"0", "1", "2", "3", "4", "5", "6", "7"}, []string{"8", "9", "10", "11", "12", "13", "14", "15"}},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			token := drawToken()
			long := strings.Repeat("x", maxGiftBytes)
			var atDoor, atDialer table
			door, err := UnixProver{}.Open(token, atDoor.descriptors(), giving("from the door", gifts.door...))
			require.NoError(t, err)
			claim := door.Expect(Nonce{2})
			ctx, cancel := soon()
			defer cancel()
			ours, err := UnixProver{}.Reach(ctx, token, Nonce{2}, atDialer.descriptors(), giving(long, gifts.dialer...))
			require.NoError(t, err)
			theirs, err := claim()
			require.NoError(t, err)
			require.NoError(t, door.Close())

			// What waits is in the table, beside a socket and a pidfd.
			require.Len(t, atDialer.listed(), 2+len(gifts.door))
			require.Len(t, atDoor.listed(), 2+len(gifts.dialer))
			fromDoor, fromDialer := ours.Take(), theirs.Take()
			require.Len(t, atDialer.listed(), 2)
			require.Len(t, atDoor.listed(), 2)
			requireGift(t, fromDoor, "from the door", gifts.door...)
			requireGift(t, fromDialer, long, gifts.dialer...)
			for _, w := range []Witness{ours, theirs} {
				require.Equal(t, os.Getpid(), w.Pid())
				require.NoError(t, w.Withheld())
				require.Empty(t, w.Take(), "taken once")
			}
			ours.Close()
			theirs.Close()
			for _, table := range []*table{&atDoor, &atDialer} {
				require.Empty(t, table.listed())
				table.requireSound(t)
			}
		})
	}
}

func TestCloseClosesWhatNobodyTook(t *testing.T) {
	check(t)
	token := drawToken()
	var atDoor, atDialer table
	door, err := UnixProver{}.Open(token, atDoor.descriptors(), giving("", "1", "2"))
	require.NoError(t, err)
	ctx, cancel := soon()
	defer cancel()
	claim := door.Expect(Nonce{2})
	ours, err := UnixProver{}.Reach(ctx, token, Nonce{2}, atDialer.descriptors(), giving("", "3"))
	require.NoError(t, err)
	theirs, err := claim()
	require.NoError(t, err)
	var closing sync.WaitGroup
	taken := make(chan Gift, 2)
	for _, w := range []Witness{ours, theirs} {
		closing.Go(w.Close)
		closing.Go(func() { taken <- w.Take() }) // who comes first does not matter
	}
	closing.Wait()
	closeFDs((<-taken).FDs)
	closeFDs((<-taken).FDs)
	require.Empty(t, ours.Take())
	require.NoError(t, door.Close())
	require.Empty(t, atDoor.listed())
	require.Empty(t, atDialer.listed())
	atDoor.requireSound(t)
	atDialer.requireSound(t)
}

func TestLinkHandsGiftsToItsSession(t *testing.T) {
	check(t)
	got := make(chan Gift, 2)
	shared := func(text string, contents ...string) func(*Config) {
		return func(c *Config) {
			c.Gift = giving(text, contents...)
			c.Attach = func(p Peer, conns []transport.Conn) (Attached, error) {
				got <- p.Witness.Take()
				session := newFakeSession(p, conns)
				manager := p.link.manager
				session.explain = func() []string {
					return []string{fmt.Sprintf("%d links", manager.LiveLinks()), "two\nlines"} // takes the manager's lock
				}
				return Attached{Session: session, Transport: "shm", Rejected: []string{"ucx: no such library"}}, nil
			}
		}
	}
	a, b := newNode(t, 1, shared("of a", "pool a", "directory a")), newNode(t, 2, shared("of b", "pool b"))
	a.mustDial(b)
	requireGift(t, <-got, "of a", "pool a", "directory a") // the acceptor's session is made first
	requireGift(t, <-got, "of b", "pool b")
	for _, explained := range []string{a.Explain(2), b.Explain(1)} {
		require.Contains(t, explained, "\ntransport: shm\nnot taken: ucx: no such library\nsame host: shown: ")
		require.Contains(t, explained, "pidfd\n1 links\ntwo?lines\ndata connection 0: ")
	}
	require.Equal(t, os.Getpid(), a.mustLink(2).Peer().Witness.Pid())
	requireJoined(t, a, b)

	elsewhere := newNode(t, 3, func(c *Config) {
		c.Gift = neverAsked(t)
		c.Attach = func(p Peer, conns []transport.Conn) (Attached, error) {
			require.Nil(t, p.Witness)
			return attach(p, conns)
		}
	})
	elsewhere.prover = nil
	other := newNode(t, 4, func(c *Config) { c.Gift = neverAsked(t) })
	elsewhere.mustDial(other)
	requireJoined(t, elsewhere, other)
}

func TestGiftOfAnotherProcess(t *testing.T) {
	check(t)
	a := newNode(t, 1)
	c := spawn(t, "engine", nil)
	_, err := a.dialTo(c.address)
	require.NoError(t, err)
	w := a.mustLink(2).Peer().Witness
	require.Equal(t, c.cmd.Process.Pid, w.Pid())
	requireGift(t, w.Take(), "from the child", "what the child shares")
}

func TestGiftThatFails(t *testing.T) {
	for name, c := range map[string]struct {
		gift func() (Gift, error)
		why  string
	}{
		"error": {func() (Gift, error) {
			gift, _ := giving("half of it", "1", "2")()
			return gift, errors.New("no descriptor\nis free")
		}, "no descriptor?is free"},
		"too long": {giving(strings.Repeat("x", maxGiftBytes+1), "1"), errGiftTooLong.Error()},
		"too many": {giving("", strings.Split("123456789", "")...), errTooManyFDs.Error()},
	} {
		for _, end := range []string{"dialer", "acceptor"} {
			t.Run(name+" at the "+end, func(t *testing.T) {
				check(t)
				fails := func(cfg *Config) { cfg.Gift = c.gift }
				works := func(cfg *Config) { cfg.Gift = giving("it works", "0") }
				a, b := newNode(t, 1, fails), newNode(t, 2, works)
				if end == "dialer" {
					a.mustDial(b)
				} else {
					b.mustDial(a)
				}
				requireJoined(t, a, b)
				la, lb := a.mustLink(2), b.mustLink(1)
				require.True(t, la.Peer().SameHost)
				require.True(t, lb.Peer().SameHost)
				require.Contains(t, a.Explain(2), "; nothing was handed to the peer: "+c.why)
				require.NotContains(t, b.Explain(1), "handed")
				require.True(t, a.saw("nothing was handed to a peer on the same host"))
				requireGift(t, la.Peer().Witness.Take(), "it works", "0")
				require.Empty(t, lb.Peer().Witness.Take())
				require.Error(t, la.Peer().Witness.Withheld())
				require.NoError(t, lb.Peer().Witness.Withheld())
			})
		}
	}
}

// shown is what an engine shows at a door: nonce, length of the gift, gift.
func shown(nonce Nonce, length int, text string) []byte {
	return append(binary.LittleEndian.AppendUint16(nonce[:], uint16(length)), text...)
}

// knock connects to a door.
func knock(token Token) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: doorAddress(token), Net: "unix"})
}

// intrude does as somebody who has learnt token and nonce, and says what came of it.
func intrude(token Token, nonce Nonce) string {
	c, err := knock(token)
	if err != nil {
		return err.Error()
	}
	gift, err := giving("", "1", "2", "3", "4")()
	if err != nil {
		return err.Error()
	}
	if _, _, err := c.WriteMsgUnix(shown(nonce, 0, ""), unix.UnixRights(gift.FDs...), nil); err != nil {
		return err.Error()
	}
	answer, err := io.ReadAll(c)
	return fmt.Sprintf("%q, %v", answer, err)
}

// say writes b with descriptors, of which each is the test's still.
func say(t *testing.T, c *net.UnixConn, b []byte, fds ...int) {
	t.Helper()
	n, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	require.NoError(t, err)
	require.Equal(t, len(b), n)
}

func TestHostileStrangersAtTheDoor(t *testing.T) {
	known, unknown := Nonce{7}, Nonce{8}
	whole := shown(known, 4, "gift")
	for name, c := range map[string]struct {
		does func(t *testing.T, c *net.UnixConn, fds []int)
		why  string // "": nobody was let in, for no reason that is told
	}{
		"gift too long": {func(t *testing.T, c *net.UnixConn, fds []int) {
			say(t, c, shown(known, maxGiftBytes+1, "x"), fds[:8]...)
		}, errGiftTooLong.Error()},
		"longest length":          {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, shown(known, 1<<16-1, "x"), fds[:1]...) }, errGiftTooLong.Error()},
		"one descriptor too many": {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole, fds[:9]...) }, errFDsCutShort.Error()},
		"many descriptors":        {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole, fds...) }, errFDsCutShort.Error()},
		"many messages": {func(t *testing.T, c *net.UnixConn, fds []int) {
			for _, b := range whole {
				_, _, _ = c.WriteMsgUnix([]byte{b}, unix.UnixRights(fds[:8]...), nil) // until it is closed
			}
		}, ""},
		"descriptors twice": {func(t *testing.T, c *net.UnixConn, fds []int) {
			say(t, c, whole[:20], fds[:8]...)
			say(t, c, whole[20:], fds[8])
		}, errTooManyFDs.Error()},
		"without the nonce":       {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, shown(unknown, 4, "gift"), fds[:8]...) }, ""},
		"no gift and no nonce":    {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, shown(unknown, 0, ""), fds[:8]...) }, ""},
		"half a nonce and gone":   {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole[:8], fds[:8]...); _ = c.Close() }, ""},
		"half a gift and gone":    {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole[:20], fds[:8]...); _ = c.Close() }, "EOF"},
		"nothing and gone":        {func(t *testing.T, c *net.UnixConn, _ []int) { _ = c.Close() }, ""},
		"half a nonce and silent": {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole[:8], fds[:8]...) }, ""},
		"no length and silent":    {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole[:17], fds[:8]...) }, "timeout"},
		"half a gift and silent":  {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, whole[:20], fds[:8]...) }, "timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			token := drawToken()
			var inside table
			door, err := UnixProver{}.Open(token, inside.descriptors(), neverAsked(t))
			require.NoError(t, err)
			claim := door.Expect(known)
			fds := mustGive(t, slices.Repeat([]string{"hostile"}, 20)...)
			stranger, err := knock(token)
			require.NoError(t, err)
			c.does(t, stranger, fds)
			_ = stranger.SetReadDeadline(time.Now().Add(patient))
			answer, err := io.ReadAll(stranger)
			require.False(t, errors.Is(err, os.ErrDeadlineExceeded), "it is still inside")
			require.Empty(t, answer, "something was handed over")
			require.Eventually(t, func() bool { return inside.tracked() > 1 && len(inside.listed()) == 1 }, patient, time.Millisecond,
				"more than the door is left")
			witness, err := claim()
			require.Nil(t, witness)
			require.ErrorContains(t, err, c.why)
			if c.why == "" {
				require.ErrorIs(t, err, errNobodyReached)
			}
			_ = stranger.Close()
			closeFDs(fds)
			require.NoError(t, door.Close())
			require.Empty(t, inside.listed())
			inside.requireSound(t)
		})
	}
}

func TestExpectedEngineGetsInBesideHostileStrangers(t *testing.T) {
	check(t)
	token := drawToken()
	var inside table
	door, err := UnixProver{}.Open(token, inside.descriptors(), giving("welcome", "1"))
	require.NoError(t, err)
	fds := mustGive(t, slices.Repeat([]string{"hostile"}, 9)...)
	var strangers []*net.UnixConn
	for i := range maxAtDoor / 2 {
		c, err := knock(token)
		require.NoError(t, err)
		strangers = append(strangers, c)
		say(t, c, shown(Nonce{9}, 4, "gift")[:16+i%4], fds[:8+i%2]...)
	}
	for range 10 {
		claim := door.Expect(Nonce{2})
		ctx, cancel := soon()
		ours, err := UnixProver{}.Reach(ctx, token, Nonce{2}, Descriptors{}, giving("thanks", "2", "3"))
		require.NoError(t, err)
		theirs, err := claim()
		require.NoError(t, err)
		requireGift(t, ours.Take(), "welcome", "1")
		requireGift(t, theirs.Take(), "thanks", "2", "3")
		ours.Close()
		theirs.Close()
		cancel()
	}
	require.NoError(t, door.Close())
	for _, c := range strangers {
		_ = c.Close()
	}
	closeFDs(fds)
	require.Empty(t, inside.listed())
	inside.requireSound(t)
}

func TestGiftThatArrivesByTheByte(t *testing.T) {
	check(t)
	token := drawToken()
	door, err := UnixProver{}.Open(token, Descriptors{}, giving("welcome", "1"))
	require.NoError(t, err)
	claim := door.Expect(Nonce{2})
	c, err := knock(token)
	require.NoError(t, err)
	fds := mustGive(t, "a", "b", "c")
	message := shown(Nonce{2}, 4, "gift")
	for i, b := range message {
		switch i {
		case 0:
			say(t, c, []byte{b}, fds[:2]...) // descriptors come with the first byte
		case len(message) - 1:
			say(t, c, []byte{b}, fds[2]) // or with any other
		default:
			say(t, c, []byte{b})
		}
	}
	var answer [1]byte
	got, err := receive(Descriptors{}.own(c), answer[:])
	require.NoError(t, err)
	require.Equal(t, byte(welcome), answer[0])
	requireGift(t, got.take(), "welcome", "1")
	witness, err := claim()
	require.NoError(t, err)
	requireGift(t, witness.Take(), "gift", "a", "b", "c")
	closeFDs(fds)
	_ = c.Close()
	select {
	case <-witness.Dead():
	case <-time.After(patient):
		require.Fail(t, "the other end let go")
	}
	witness.Close()
	require.NoError(t, door.Close())
}

func TestDescriptorsThatComeBehindTheProofAreNotTaken(t *testing.T) {
	check(t)
	token := drawToken()
	var inside table
	door, err := UnixProver{}.Open(token, inside.descriptors(), nil)
	require.NoError(t, err)
	claim := door.Expect(Nonce{2})
	c, err := knock(token)
	require.NoError(t, err)
	fds := mustGive(t, "a")
	say(t, c, append(shown(Nonce{2}, 4, "gift"), "and more"...), fds...)
	_, err = io.ReadFull(c, make([]byte, 3))
	require.NoError(t, err)
	tracked := inside.tracked()
	for range 100 {
		say(t, c, []byte("more"), fds...)
	}
	witness, err := claim()
	require.NoError(t, err)
	requireGift(t, witness.Take(), "gift", "a")
	require.Equal(t, tracked, inside.tracked())
	closeFDs(fds)
	_ = c.Close()
	witness.Close()
	require.NoError(t, door.Close())
	require.Empty(t, inside.listed())
}

func TestHostileDoor(t *testing.T) {
	for name, c := range map[string]struct {
		answers func(t *testing.T, c *net.UnixConn, fds []int)
		why     string
	}{
		"no welcome":       {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, []byte{2, 1, 0, 'x'}, fds[:8]...) }, "unexpected answer"},
		"gift too long":    {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, []byte{welcome, 1, 4, 'x'}, fds[:8]...) }, errGiftTooLong.Error()},
		"many descriptors": {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, []byte{welcome, 1, 0, 'x'}, fds...) }, errFDsCutShort.Error()},
		"gone": {func(t *testing.T, c *net.UnixConn, fds []int) {
			say(t, c, []byte{welcome, 1, 0}, fds[:8]...)
			_ = c.Close()
		}, "EOF"},
		"gone at once": {func(t *testing.T, c *net.UnixConn, _ []int) { _ = c.Close() }, "show the nonce"},
		"silent":       {func(t *testing.T, c *net.UnixConn, fds []int) { say(t, c, []byte{welcome, 1, 0}, fds[:8]...) }, context.DeadlineExceeded.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			token := drawToken()
			listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: doorAddress(token), Net: "unix"})
			require.NoError(t, err)
			fds := mustGive(t, slices.Repeat([]string{"hostile"}, 9)...)
			answered := make(chan *net.UnixConn, 1)
			go func() {
				conn, err := listener.AcceptUnix()
				if err != nil {
					t.Error(err)
				} else {
					_, _ = io.ReadFull(conn, make([]byte, 22))
					c.answers(t, conn, fds)
				}
				answered <- conn
			}()
			var table table
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			if name != "silent" {
				cancel()
				ctx, cancel = soon()
			}
			defer cancel()
			witness, err := UnixProver{}.Reach(ctx, token, Nonce{2}, table.descriptors(), giving("gift", "1", "2"))
			require.Nil(t, witness)
			require.ErrorContains(t, err, c.why)
			_ = (<-answered).Close()
			_ = listener.Close()
			closeFDs(fds)
			require.Empty(t, table.listed())
			table.requireSound(t)
		})
	}
}

func TestDescriptorsOfAnotherUserAreNeverReceived(t *testing.T) {
	needRoot(t)
	check(t)
	var inside table
	door, err := UnixProver{}.Open(tokenOf("not yours"), inside.descriptors(), neverAsked(t))
	require.NoError(t, err)
	claim := door.Expect(Nonce{1})
	child := spawn(t, "intrude:not yours", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	})
	require.True(t, strings.HasPrefix(child.address, `"", `), child.address)
	witness, err := claim()
	require.Nil(t, witness)
	require.ErrorContains(t, err, "runs under uid 12345")
	require.Equal(t, 2, inside.tracked(), "the door and the connection")
	require.NoError(t, door.Close())
	require.Empty(t, inside.listed())
}

func TestPidIsThatOfOurPidNamespace(t *testing.T) {
	needRoot(t)
	check(t)
	door, err := UnixProver{}.Open(tokenOf("outside"), Descriptors{}, nil)
	require.NoError(t, err)
	claim := door.Expect(Nonce{1})
	child := spawn(t, "pid:outside", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	})
	witness, err := claim()
	require.NoError(t, door.Close())
	if strings.HasPrefix(child.address, "pidfd of the other end") {
		witness.Close()
		t.Skip("this kernel has no pidfd of a process without a number: " + child.address)
	}
	require.NoError(t, err)
	require.Equal(t, "pid 0", child.address, "we have no number in there")
	require.Equal(t, child.cmd.Process.Pid, witness.Pid())
	witness.Close()
}

func TestProofThatIsLostOnTheWayBackClosesItsGift(t *testing.T) {
	check(t)
	a, b := newNode(t, 1), newNode(t, 2)
	a.cfg.Gift = giving("lost", "1", "2") // the door of a has none: it was opened before
	a.prover = forgetful{UnixProver{}}
	a.mustDial(b)
	require.False(t, a.mustLink(2).Peer().SameHost)
	require.False(t, b.mustLink(1).Peer().SameHost)
	require.Nil(t, b.mustLink(1).Peer().Witness)
	require.Contains(t, b.Explain(1), "same host: not shown: it was forgotten")
	requireJoined(t, a, b)
}

// forgetful loses the witness that it got.
type forgetful struct{ UnixProver }

func (f forgetful) Reach(ctx context.Context, token Token, nonce Nonce, fds Descriptors, gift func() (Gift, error)) (Witness, error) {
	w, err := f.UnixProver.Reach(ctx, token, nonce, fds, gift)
	if err != nil {
		return nil, err
	}
	w.Close()
	return nil, errors.New("it was forgotten")
}

func FuzzGift(f *testing.F) {
	f.Add(shown(Nonce{1}, 4, "gift"), uint8(2))
	f.Add(shown(Nonce{1}, maxGiftBytes+1, "gift"), uint8(8))
	f.Add([]byte{1, 2, 3}, uint8(9))
	f.Fuzz(func(t *testing.T, message []byte, descriptors uint8) {
		if len(message) == 0 || len(message) > 4<<10 {
			return
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		var ends [2]*net.UnixConn
		for i, fd := range pair {
			file := os.NewFile(uintptr(fd), "socket")
			c, err := net.FileConn(file)
			require.NoError(t, err)
			require.NoError(t, file.Close())
			ends[i] = c.(*net.UnixConn)
		}
		fds := slices.Repeat([]int{int(os.Stdin.Fd())}, int(descriptors%12))
		say(t, ends[0], message, fds...)
		require.NoError(t, ends[0].Close())
		var table table
		var nonce Nonce
		got, err := receive(table.descriptors().own(ends[1]), nonce[:])
		if err == nil {
			require.LessOrEqual(t, len(got.gift.Bytes), maxGiftBytes)
			require.Len(t, got.gift.FDs, len(fds))
			require.True(t, bytes.HasPrefix(message, shown(nonce, len(got.gift.Bytes), string(got.gift.Bytes))))
			got.close()
		}
		require.Len(t, table.listed(), 1, "the socket")
		require.NoError(t, ends[1].Close())
	})
}
