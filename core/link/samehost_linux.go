// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// UnixProver is the Prover of production. A door is an abstract Unix socket named by the token: to reach it shows a shared network
// namespace, SO_PEERCRED a shared uid, and the pidfd that both ends then hold tells when the other process is gone.
//
//	who reaches                     door
//	                                its credentials are ours, else it reads no descriptor
//	its credentials are ours, else it sends nothing
//	nonce, gift      ->
//	                                nonce is expected; the witness is in its place
//	                 <-             welcome, gift
type UnixProver struct{}

const (
	// Who knows the nonce sends it at once.
	doorTimeout = time.Second
	// Any local user can find an abstract socket; this bounds what that costs.
	maxAtDoor = 64

	soPeerPidfd = 77 // SO_PEERPIDFD, Linux 6.5

	welcome = 1 // the byte with which a door answers, before its gift
)

var (
	errNobodyReached = errors.New("peer did not reach our Unix socket")
	errOverflowUID   = errors.New("the uid of the other end is not known in this user namespace")
)

func doorAddress(token Token) string { return "@llm-datadist-" + hex.EncodeToString(token[:]) }

// dataAddress does not give the token away: any local user can read the names of sockets, and this one is there before the door.
func dataAddress(token Token) string {
	hashed := sha256.Sum256(append([]byte("data"), token[:]...))
	return "@llm-datadist-data-" + hex.EncodeToString(hashed[:16])
}

// Open listens on the abstract socket of token.
func (UnixProver) Open(token Token, fds Descriptors, gift func() (Gift, error)) (Door, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: doorAddress(token), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on a Unix socket: %w", err)
	}
	fds.track(listener)
	ctx, cancel := context.WithCancel(context.Background())
	d := &unixDoor{listener: listener, fds: fds, gift: gift, ctx: ctx, cancel: cancel, expected: map[Nonce]*visit{}}
	d.tasks.Add(1)
	go d.answer()
	return d, nil
}

// Reach connects to the abstract socket of token.
func (UnixProver) Reach(ctx context.Context, token Token, nonce Nonce, fds Descriptors, gift func() (Gift, error)) (Witness, error) {
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, "unix", doorAddress(token))
	if err != nil {
		return nil, fmt.Errorf("reach the Unix socket of the peer: %w", err)
	}
	c := fds.own(raw)
	unbind := c.bind(ctx)
	theirs, withheld, err := visitDoor(c, nonce, gift)
	if !unbind() {
		if err == nil {
			theirs.close()
		}
		err = ctx.Err()
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("show the nonce at the Unix socket of the peer: %w", err)
	}
	return newUnixWitness(c, theirs, withheld)
}

// visitDoor exchanges nonce and gift for the gift of the door. withheld says why ours was not given.
func visitDoor(c *conn, nonce Nonce, gift func() (Gift, error)) (theirs *parcel, withheld, err error) {
	// The credentials come first: nobody else learns the nonce.
	if err := trustedPeer(c.Conn); err != nil {
		return nil, nil, err
	}
	ours, withheld := pack(c.fds, gift)
	err = ours.send(c, nonce[:])
	ours.close()
	if err != nil {
		return nil, nil, err
	}
	var answer [1]byte
	if theirs, err = receive(c, answer[:]); err != nil {
		return nil, nil, err
	}
	if answer[0] != welcome {
		theirs.close()
		return nil, nil, errors.New("unexpected answer")
	}
	return theirs, withheld, nil
}

// ListenData listens on an abstract socket of its own. It does not let in who runs under another uid.
func (UnixProver) ListenData(token Token) (net.Listener, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: dataAddress(token), Net: "unix"})
	if err != nil {
		return nil, err
	}
	return trustingListener{listener}, nil
}

// DialData connects to the socket of ListenData, from one with a name of its own, which tells the connections of a host apart.
func (UnixProver) DialData(ctx context.Context, token Token) (net.Conn, error) {
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.Bind(int(fd), &unix.SockaddrUnix{}) }) // the kernel finds a name
		return errors.Join(err, failed)
	}}
	c, err := dialer.DialContext(ctx, "unix", dataAddress(token))
	if err != nil {
		return nil, err
	}
	if err := trustedPeer(c); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// trustingListener turns away who runs under another uid.
type trustingListener struct{ *net.UnixListener }

func (l trustingListener) Accept() (net.Conn, error) {
	for {
		c, err := l.UnixListener.Accept()
		if err != nil {
			return nil, err
		}
		if trustedPeer(c) == nil {
			return c, nil
		}
		_ = c.Close()
	}
}

// unixDoor answers at an abstract Unix socket.
type unixDoor struct {
	listener *net.UnixListener
	fds      Descriptors
	gift     func() (Gift, error) // or nil
	ctx      context.Context
	cancel   context.CancelFunc
	tasks    sync.WaitGroup

	mu       sync.Mutex
	expected map[Nonce]*visit // guarded by mu
	inside   int              // connections that have not shown a nonce; guarded by mu
}

// visit is what is known of the engine that is expected with a nonce. Guarded by unixDoor.mu.
type visit struct {
	witness Witness
	err     error
}

func (d *unixDoor) Expect(nonce Nonce) func() (Witness, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := &visit{err: errNobodyReached}
	d.expected[nonce] = v
	return func() (Witness, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.expected, nonce)
		return v.witness, v.err
	}
}

func (d *unixDoor) Close() error {
	d.cancel()
	d.fds.untrack(d.listener)
	err := d.listener.Close()
	d.tasks.Wait()
	return err
}

func (d *unixDoor) answer() {
	defer d.tasks.Done()
	d.fds.acceptEach(d.ctx, d.listener, d.ctx.Done(), nil, d.admit)
}

func (d *unixDoor) admit(c *conn) {
	d.mu.Lock()
	full := d.inside >= maxAtDoor
	if !full {
		d.inside++
		d.tasks.Add(1)
	}
	d.mu.Unlock()
	if full {
		_ = c.Close()
		return
	}
	go func() {
		defer d.tasks.Done()
		d.meet(c)
		d.mu.Lock()
		d.inside--
		d.mu.Unlock()
	}()
}

// meet keeps c as a witness when whoever is at its other end is trusted and expected, and closes it otherwise.
func (d *unixDoor) meet(c *conn) {
	nonce, theirs, err := d.hear(c)
	if err != nil {
		d.settle(nonce, nil, err)
		_ = c.Close()
		return
	}
	if !d.expects(nonce) {
		theirs.close()
		_ = c.Close()
		return
	}
	ours, withheld := pack(d.fds, d.gift)
	defer ours.close()
	witness, err := newUnixWitness(c, theirs, withheld)
	if err != nil {
		d.settle(nonce, nil, err)
		return
	}
	if !d.settle(nonce, witness, nil) {
		witness.Close()
		return
	}
	// The witness is in its place before the other end can know of it. Where this answer is lost, the other end says "not the same
	// host" and the claim is dropped.
	if ours.send(c, []byte{welcome}) != nil {
		_ = c.Close() // the other end need not wait
	}
}

// hear reads what a visitor has to show. Beside an error nonce is zero where it did not come whole.
func (d *unixDoor) hear(c *conn) (nonce Nonce, theirs *parcel, err error) {
	ctx, cancel := context.WithTimeout(d.ctx, doorTimeout)
	defer cancel()
	unbind := c.bind(ctx)
	if trust := trustedPeer(c.Conn); trust == nil {
		theirs, err = receive(c, nonce[:])
	} else {
		nonce, err = hearStranger(c, trust)
	}
	if !unbind() && err == nil {
		theirs.close()
		err = ctx.Err()
	}
	return nonce, theirs, err
}

// hearStranger reads the nonce of a visitor who is not trusted, and why, so that the engine that expects it learns of it. It reads
// without control data: no descriptor of a stranger gets into our table.
func hearStranger(c *conn, trust error) (Nonce, error) {
	var nonce Nonce
	if _, err := io.ReadFull(c, nonce[:]); err != nil {
		return Nonce{}, err
	}
	return nonce, trust
}

func (d *unixDoor) expects(nonce Nonce) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.expected[nonce] != nil
}

// settle records what came of the visit with nonce. It returns false where nobody is expected, or somebody came before.
func (d *unixDoor) settle(nonce Nonce, w Witness, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.expected[nonce]
	if !ok || v.witness != nil {
		return false
	}
	v.witness, v.err = w, err
	return true
}

// credentials returns who the process at the other end of a Unix socket is, as seen from our namespaces.
func credentials(c net.Conn) (*unix.Ucred, error) {
	var cred *unix.Ucred
	err := onDescriptor(c, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("credentials of the other end: %w", err)
	}
	return cred, nil
}

// trustedPeer returns nil if the process at the other end of a Unix socket runs under our uid.
func trustedPeer(c net.Conn) error {
	cred, err := credentials(c)
	if err != nil {
		return err
	}
	ours := uint32(os.Geteuid())
	if cred.Uid != ours {
		return fmt.Errorf("the other end runs under uid %d, this process under %d", cred.Uid, ours)
	}
	if cred.Uid == overflowUID() {
		return errOverflowUID
	}
	return nil
}

// overflowUID is what the kernel shows for every uid that has no name in this user namespace: it says nothing about who that is.
func overflowUID() uint32 {
	const usual = 65534
	text, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err != nil {
		return usual
	}
	uid, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return usual
	}
	return uint32(uid)
}

// peerPidfd returns a non-blocking pidfd of the process at the other end of a Unix socket.
func peerPidfd(c net.Conn) (int, error) {
	pidfd := -1
	err := onDescriptor(c, func(fd int) (err error) {
		if pidfd, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, soPeerPidfd); err == nil {
			return nil
		}
		// Older than Linux 6.5: by number. Should the process be gone and its number be reused, then its end of the socket is closed.
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return err
		}
		pidfd, err = unix.PidfdOpen(int(cred.Pid), 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("pidfd of the other end: %w", err)
	}
	if err := unix.SetNonblock(pidfd, true); err != nil {
		_ = unix.Close(pidfd)
		return -1, fmt.Errorf("pidfd of the other end: %w", err)
	}
	return pidfd, nil
}

// onDescriptor runs f on the descriptor of c.
func onDescriptor(c net.Conn, f func(fd int) error) error {
	unixConn, ok := c.(*net.UnixConn)
	if !ok {
		return errNotUnixSocket
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// unixWitness watches a process by its pidfd and by its end of a Unix socket: the first outlives a descriptor that was passed to a
// child, the second tells of an engine that was closed while its process lives on. Both wait in Go's poller, without a thread.
type unixWitness struct {
	socket   *conn
	pid      int
	pidfd    *os.File
	withheld error
	tasks    sync.WaitGroup
	dead     chan struct{}

	mu     sync.Mutex
	theirs *parcel // guarded by mu
}

// newUnixWitness takes c and theirs over, also where it returns an error.
func newUnixWitness(c *conn, theirs *parcel, withheld error) (Witness, error) {
	cred, err := credentials(c.Conn)
	pidfd := -1
	if err == nil {
		pidfd, err = peerPidfd(c.Conn)
	}
	if err != nil {
		theirs.close()
		_ = c.Close()
		return nil, err
	}
	w := &unixWitness{
		socket: c, pid: int(cred.Pid), pidfd: os.NewFile(uintptr(pidfd), "pidfd"), withheld: withheld, dead: make(chan struct{}),
		theirs: theirs,
	}
	c.fds.track(w.pidfd)
	die := sync.OnceFunc(func() { close(w.dead) })
	w.tasks.Go(func() { w.watchSocket(die) })
	w.tasks.Go(func() { w.watchProcess(die) })
	return w, nil
}

func (w *unixWitness) Dead() <-chan struct{} { return w.dead }

func (w *unixWitness) Take() Gift {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.theirs.take()
}

func (w *unixWitness) Pid() int { return w.pid }

func (w *unixWitness) Withheld() error { return w.withheld }

func (w *unixWitness) Close() {
	w.mu.Lock()
	w.theirs.close()
	w.mu.Unlock()
	w.socket.fds.untrack(w.pidfd)
	_ = w.pidfd.Close()
	_ = w.socket.Close()
	w.tasks.Wait()
}

func (w *unixWitness) watchSocket(die func()) {
	var scratch [16]byte
	for {
		if _, err := w.socket.Read(scratch[:]); err != nil {
			die()
			return
		}
	}
}

// watchProcess waits for the end of the process. Where its pidfd can't be waited for, the socket alone tells.
func (w *unixWitness) watchProcess(die func()) {
	raw, err := w.pidfd.SyscallConn()
	if err != nil {
		return
	}
	gone := false
	_ = raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n > 0
		return gone
	})
	if gone {
		die()
	}
}
