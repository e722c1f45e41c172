// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// A gift travels over the Unix socket behind a head of known size (a nonce, or a welcome): u16 length, bytes. Its descriptors come
// with the first byte of the head, and close-on-exec.

const (
	// A gift names a few pieces of shared memory: bounds of what a peer may have us keep.
	maxGiftBytes = 1 << 10
	maxGiftFDs   = 8

	giftLengthBytes = 2
)

var (
	errGiftTooLong   = fmt.Errorf("a gift of more than %d bytes", maxGiftBytes)
	errTooManyFDs    = fmt.Errorf("a gift of more than %d descriptors", maxGiftFDs)
	errFDsCutShort   = fmt.Errorf("descriptors of the gift are missing: more than %d were sent, or this process can have no more", maxGiftFDs)
	errNotUnixSocket = errors.New("not a Unix socket")
)

// parcel is a gift on its way. Its descriptors are ours to close, and in the table until then.
type parcel struct {
	fds  Descriptors
	gift Gift
}

// pack makes the parcel that is to be sent. Beside an error it is empty.
func pack(fds Descriptors, gift func() (Gift, error)) (*parcel, error) {
	p := &parcel{fds: fds}
	if gift == nil {
		return p, nil
	}
	made, err := gift()
	p.keep(made.FDs)
	switch {
	case err != nil:
	case len(made.Bytes) > maxGiftBytes:
		err = errGiftTooLong
	case len(made.FDs) > maxGiftFDs:
		err = errTooManyFDs
	}
	if err != nil {
		p.close()
		return p, err
	}
	p.gift.Bytes = made.Bytes
	return p, nil
}

// keep takes descriptors over.
func (p *parcel) keep(fds []int) {
	for _, fd := range fds {
		p.fds.trackFD(fd)
	}
	p.gift.FDs = append(p.gift.FDs, fds...)
}

// take empties the parcel and passes what was in it on.
func (p *parcel) take() Gift {
	gift := p.gift
	p.gift = Gift{}
	for _, fd := range gift.FDs {
		p.fds.untrackFD(fd)
	}
	return gift
}

// close closes the descriptors that are in the parcel.
func (p *parcel) close() {
	for _, fd := range p.take().FDs {
		_ = unix.Close(fd)
	}
}

// send writes head and the gift. The descriptors stay ours too.
func (p *parcel) send(c *conn, head []byte) error {
	socket, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return errNotUnixSocket
	}
	message := binary.LittleEndian.AppendUint16(slices.Clip(head), uint16(len(p.gift.Bytes)))
	message = append(message, p.gift.Bytes...)
	var rights []byte
	if len(p.gift.FDs) > 0 {
		rights = unix.UnixRights(p.gift.FDs...)
	}
	sent, _, err := socket.WriteMsgUnix(message, rights, nil)
	if err == nil && sent < len(message) {
		_, err = c.Write(message[sent:]) // the descriptors went with the first byte
	}
	return err
}

// receive reads what send has written: it fills head and returns the gift. Beside an error there is no gift, and head is filled, or as
// it was where it did not come whole.
func receive(c *conn, head []byte) (*parcel, error) {
	p := &parcel{fds: c.fds}
	err := p.receive(c, head)
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *parcel) receive(c *conn, head []byte) error {
	socket, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return errNotUnixSocket
	}
	first := make([]byte, len(head)+giftLengthBytes)
	read, err := p.fill(socket, first)
	if read >= len(head) {
		copy(head, first)
	}
	if err != nil {
		return err
	}
	length := binary.LittleEndian.Uint16(first[len(head):])
	switch {
	case length == 0:
		return nil
	case length > maxGiftBytes:
		return errGiftTooLong
	}
	p.gift.Bytes = make([]byte, length)
	_, err = p.fill(socket, p.gift.Bytes)
	return noEOF(err)
}

// fill fills b, keeps the descriptors that come with it, and returns how many bytes it has read. It never reads beyond b.
func (p *parcel) fill(socket *net.UnixConn, b []byte) (read int, err error) {
	control := make([]byte, unix.CmsgSpace(4*maxGiftFDs)) // 4 bytes each
	for read < len(b) {
		n, controlled, flags, _, err := socket.ReadMsgUnix(b[read:], control)
		read += n
		// First what has arrived, in spite of any error: it is in our table.
		if kept := p.unpack(control[:controlled]); kept != nil {
			return read, kept
		}
		switch {
		case flags&unix.MSG_CTRUNC != 0:
			return read, errFDsCutShort
		case len(p.gift.FDs) > maxGiftFDs:
			return read, errTooManyFDs
		case errors.Is(err, io.EOF) && read > 0:
			return read, io.ErrUnexpectedEOF
		case err != nil:
			return read, err
		}
	}
	return read, nil
}

// unpack keeps the descriptors of control messages. The kernel writes no others than those of SCM_RIGHTS unless it is asked to.
func (p *parcel) unpack(control []byte) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("control message: %w", err)
	}
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			return fmt.Errorf("control message: %w", err)
		}
		p.keep(fds)
	}
	return nil
}
