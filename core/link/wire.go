// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Every connection starts with a preamble from the end that dials and a hello in CBOR behind a u32 length. The answer is a preamble
// with the same intent, for a control connection with a hello behind it, or a preamble with intentRefuse and a refusal behind it.
// The layout of the preamble is the same in every version. All numbers are little-endian.
const (
	magic        = "LLMDDist"
	major uint16 = 1
	minor uint16 = 0
	// features holds a bit for each ability that both ends must have to use it; there is none yet.
	features uint64 = 0

	preambleBytes = len(magic) + 2 + 2 + 8 + 1
)

// intent says what a connection is for.
type intent uint8

const (
	intentControl  intent = 1
	intentData     intent = 2
	intentUnlink   intent = 3
	intentAnnounce intent = 4   // only to a rendezvous address
	intentRefuse   intent = 255 // only in an answer
)

// frameKind says what a frame on a control connection is. Kinds that a reader doesn't know are skipped: a later minor version may
// have more.
type frameKind uint16

const (
	frameView   frameKind = 1 // view: what the end that doesn't decide has retired
	frameGo     frameKind = 2 // decision: the link's number
	frameRefuse frameKind = 3 // refusal
	frameReady  frameKind = 4 // ready: the end that dialed has everything; answered with the same kind
	framePing   frameKind = 5 // empty
	frameDone   frameKind = 6 // unlinked; empty
	frameRoster frameKind = 7 // roster: the answer to an announcement, when all members are there
)

const (
	frameHeaderBytes = 4 + 2
	// A handshake is a few hundred bytes; the bound is what a stranger may make us allocate.
	maxHandshakeBytes = 64 << 10
	// design: a control frame is at most 4 MiB.
	maxFrameBytes = 4 << 20
	// Bounds of what a peer may have us keep or show.
	maxOffers    = 16
	maxNameBytes = 32
	maxTextBytes = 1 << 10
)

var (
	errNotOurs  = errors.New("peer does not speak this protocol")
	errTooLarge = errors.New("frame is longer than the protocol allows")
)

// preamble is what every connection starts with.
type preamble struct {
	major, minor uint16
	features     uint64
	intent       intent
}

func ourPreamble(i intent) preamble {
	return preamble{major: major, minor: minor, features: features, intent: i}
}

func (p preamble) append(b []byte) []byte {
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, p.major)
	b = binary.LittleEndian.AppendUint16(b, p.minor)
	b = binary.LittleEndian.AppendUint64(b, p.features)
	return append(b, byte(p.intent))
}

// readPreamble returns errNotOurs as soon as the magic doesn't match, before it waits for more.
func readPreamble(r io.Reader) (preamble, error) {
	var b [preambleBytes]byte
	// A stranger may send less than the magic and wait for an answer: judge what there is.
	for n := 0; n < len(magic); {
		got, err := r.Read(b[n:len(magic)])
		n += got
		if string(b[:n]) != magic[:n] {
			return preamble{}, errNotOurs
		}
		if err != nil && n < len(magic) {
			return preamble{}, err
		}
	}
	if _, err := io.ReadFull(r, b[len(magic):]); err != nil {
		return preamble{}, err
	}
	rest := b[len(magic):]
	return preamble{
		major:    binary.LittleEndian.Uint16(rest),
		minor:    binary.LittleEndian.Uint16(rest[2:]),
		features: binary.LittleEndian.Uint64(rest[4:]),
		intent:   intent(rest[12]),
	}, nil
}

// hello introduces one end. Which fields matter depends on the intent.
type hello struct {
	Incarnation     []byte   `cbor:"1,keyasint"`
	ClusterID       uint64   `cbor:"2,keyasint"`
	OneSided        bool     `cbor:"3,keyasint,omitempty"`
	Offers          []string `cbor:"4,keyasint,omitempty"`
	Required        string   `cbor:"5,keyasint,omitempty"`
	Token           []byte   `cbor:"6,keyasint,omitempty"`  // where the Prover answers; absent where none does
	Nonce           []byte   `cbor:"7,keyasint,omitempty"`  // of the control connection
	DataConnections uint32   `cbor:"8,keyasint,omitempty"`  // that will be dialed
	Retired         uint64   `cbor:"9,keyasint,omitempty"`  // view of the end that accepted
	Index           uint32   `cbor:"10,keyasint,omitempty"` // of a data connection
	Target          uint64   `cbor:"11,keyasint,omitempty"` // cluster id that an unlink means
	PatienceMillis  uint64   `cbor:"12,keyasint,omitempty"` // how long the end that dialed waits
	PeerDeadMillis  uint64   `cbor:"13,keyasint,omitempty"` // how long this end lets a peer be silent; 0: for ever
	Newest          uint64   `cbor:"14,keyasint,omitempty"` // view of the end that accepted
	Card            []byte   `cbor:"15,keyasint,omitempty"` // of Config.Card
}

// view is what the end that doesn't decide tells the one that does: the number of the newest link that it has retired, and of the
// newest GO that it has followed.
type view struct {
	Retired uint64 `cbor:"1,keyasint"`
	Newest  uint64 `cbor:"2,keyasint,omitempty"`
}

type decision struct {
	Number uint64 `cbor:"1,keyasint"`
}

type refusal struct {
	Code  uint32 `cbor:"1,keyasint"`
	Cause string `cbor:"2,keyasint"`
}

type ready struct {
	SameHost bool   `cbor:"1,keyasint"`
	Reason   string `cbor:"2,keyasint,omitempty"`
}

var (
	encoder = func() cbor.EncMode {
		mode, err := cbor.CanonicalEncOptions().EncMode()
		if err != nil {
			panic(err) // the options are constants
		}
		return mode
	}()
	// decoder accepts what a hello needs and little more. Unknown fields are skipped: a later minor version may have more.
	decoder = func() cbor.DecMode {
		mode, err := cbor.DecOptions{
			DupMapKey:        cbor.DupMapKeyEnforcedAPF,
			MaxNestedLevels:  8,
			MaxArrayElements: 64,
			MaxMapPairs:      64,
			IndefLength:      cbor.IndefLengthForbidden,
			TagsMd:           cbor.TagsForbidden,
			UTF8:             cbor.UTF8RejectInvalid,
		}.DecMode()
		if err != nil {
			panic(err) // the options are constants
		}
		return mode
	}()
)

func encode(v any) []byte {
	b, err := encoder.Marshal(v)
	if err != nil {
		panic(err) // every message is a struct of plain fields
	}
	return b
}

// appendBlock appends v behind a u32 length.
func appendBlock(b []byte, v any) []byte {
	body := encode(v)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

// readBlock reads what appendBlock wrote into v.
func readBlock(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.LittleEndian.Uint32(head[:])
	if size > maxHandshakeBytes {
		return errTooLarge
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return noEOF(err)
	}
	return decoder.Unmarshal(body, v)
}

// readHello reads and checks a hello for intent i.
func readHello(r io.Reader, i intent) (hello, error) {
	var h hello
	if err := readBlock(r, &h); err != nil {
		return h, err
	}
	return h, h.check(i)
}

func (h *hello) check(i intent) error {
	if len(h.Incarnation) != len(Incarnation{}) {
		return errors.New("hello: incarnation has a wrong length")
	}
	if len(h.Token) != 0 && len(h.Token) != len(Token{}) {
		return errors.New("hello: token has a wrong length")
	}
	if i != intentUnlink && len(h.Nonce) != len(Nonce{}) {
		return errors.New("hello: nonce has a wrong length")
	}
	if h.DataConnections > MaxDataConnections || h.Index >= MaxDataConnections {
		return errors.New("hello: too many data connections")
	}
	if len(h.Card) > MaxCardBytes {
		return errors.New("hello: what it says of itself is too long")
	}
	if len(h.Offers) > maxOffers || len(h.Required) > maxNameBytes {
		return errors.New("hello: too many transports")
	}
	for _, name := range h.Offers {
		if len(name) > maxNameBytes {
			return errors.New("hello: name of a transport is too long")
		}
	}
	return nil
}

func appendFrame(b []byte, kind frameKind, body []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint16(b, uint16(kind))
	return append(b, body...)
}

// readFrameHeader reads the head of a frame and checks its length against limit.
func readFrameHeader(r io.Reader, limit uint32) (frameKind, uint32, error) {
	var head [frameHeaderBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, err
	}
	size := binary.LittleEndian.Uint32(head[:])
	if size > limit {
		return 0, 0, errTooLarge
	}
	return frameKind(binary.LittleEndian.Uint16(head[4:])), size, nil
}

// readFrame reads a frame of kind want into v and skips others; it returns what a refusal says as an error.
func readFrame(r io.Reader, want frameKind, v any) error {
	for {
		kind, size, err := readFrameHeader(r, maxHandshakeBytes)
		if err != nil {
			return err
		}
		if kind != want && kind != frameRefuse {
			if err := skip(r, size); err != nil {
				return err
			}
			continue
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(r, body); err != nil {
			return noEOF(err)
		}
		if kind == frameRefuse {
			var no refusal
			if err := decoder.Unmarshal(body, &no); err != nil {
				return err
			}
			return no.asError()
		}
		if v == nil {
			return nil
		}
		return decoder.Unmarshal(body, v)
	}
}

// skip reads size bytes and forgets them.
func skip(r io.Reader, size uint32) error {
	_, err := io.CopyN(io.Discard, r, int64(size))
	return noEOF(err)
}

// refused is what the peer answered instead of going on.
type refused struct {
	code  status.Code
	cause string
}

func (r *refused) Error() string { return r.cause }

func (no refusal) asError() error {
	code := status.Code(no.Code)
	switch code {
	case status.AlreadyLink, status.ParamInvalid, status.LinkFailed, status.UnlinkFailed, status.Timeout, status.EngineFinalized:
	default:
		code = status.LinkFailed
	}
	return &refused{code: code, cause: printable(no.Cause)}
}

func refusalOf(code status.Code, format string, args ...any) refusal {
	return refusal{Code: uint32(code), Cause: printable(fmt.Sprintf(format, args...))}
}

// printable makes text of a peer fit for a log: one bounded line.
func printable(text string) string {
	if len(text) > maxTextBytes {
		text = text[:maxTextBytes]
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
}

// noEOF turns the end of the stream in the middle of something into an error that says so.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
