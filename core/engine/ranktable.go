// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strconv"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

const (
	// mostRankTable bounds the bytes of a rank table, far above the largest clusters' tables.
	mostRankTable = 4 << 20
	// defaultRendezvousPort is where rank 0 listens, plus the id of its device (docs/options.md).
	defaultRendezvousPort = 16666
)

// rankTable is what link() needs of a rank table of version 1.0 or 1.2. Everything else in it is skipped.
type rankTable struct {
	Version string `json:"version"`
	Servers []struct {
		ServerID string       `json:"server_id"`
		HostIP   string       `json:"host_ip"`
		Devices  []rankDevice `json:"device"`
	} `json:"server_list"`

	ranks map[uint32]rankPlace
}

type rankDevice struct {
	DeviceID string `json:"device_id"`
	DeviceIP string `json:"device_ip"`
	RankID   string `json:"rank_id"`
}

// rankPlace is where the table says that a rank is.
type rankPlace struct {
	ips    []string // in the order in which they are tried
	device uint64
}

// parseRankTable returns LinkFailed for what is no rank table. A rank that it lacks is seen when the rank is looked for.
func parseRankTable(text string) (*rankTable, error) {
	if len(text) > mostRankTable {
		return nil, status.Newf(status.LinkFailed, status.StageCheck, "the rank table has %d bytes, more than %d", len(text), mostRankTable)
	}
	t := &rankTable{ranks: map[uint32]rankPlace{}}
	if err := json.Unmarshal([]byte(text), t); err != nil {
		return nil, status.Newf(status.LinkFailed, status.StageCheck, "the rank table is not the JSON of one: %w", err)
	}
	if !slices.Contains([]string{"", "1.0", "1.2"}, t.Version) {
		return nil, status.Newf(status.LinkFailed, status.StageCheck, "the rank table has version %q, not \"1.0\" or \"1.2\"", t.Version)
	}
	for _, server := range t.Servers {
		for _, device := range server.Devices {
			if err := t.add(device, server.ServerID, server.HostIP); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}

func (t *rankTable) add(device rankDevice, others ...string) error {
	if device.RankID == "" {
		return nil
	}
	rank, err := strconv.ParseUint(device.RankID, 10, 32)
	if err != nil {
		return status.Newf(status.LinkFailed, status.StageCheck, "the rank table has a rank_id %q", device.RankID)
	}
	if _, twice := t.ranks[uint32(rank)]; twice {
		return status.Newf(status.LinkFailed, status.StageCheck, "the rank table has rank %d twice", rank)
	}
	var place rankPlace
	if device.DeviceID != "" {
		if place.device, err = strconv.ParseUint(device.DeviceID, 10, 16); err != nil || place.device+defaultRendezvousPort > 1<<16-1 {
			return status.Newf(status.LinkFailed, status.StageCheck, "the rank table has a device_id %q", device.DeviceID)
		}
	}
	for _, text := range append([]string{device.DeviceIP}, others...) {
		ip, err := netip.ParseAddr(text)
		if known := ip.Unmap().String(); err == nil && !ip.IsUnspecified() && !slices.Contains(place.ips, known) {
			place.ips = append(place.ips, known)
		}
	}
	t.ranks[uint32(rank)] = place
	return nil
}

// at returns where rank is, or LinkFailed where the table does not say.
func (t *rankTable) at(rank uint32) (rankPlace, error) {
	place, ok := t.ranks[rank]
	if !ok {
		return place, status.Newf(status.LinkFailed, status.StageResolve, "the rank table has no device with rank_id %d", rank)
	}
	if len(place.ips) == 0 {
		return place, status.Newf(status.LinkFailed, status.StageResolve,
			"neither device_ip nor server_id nor host_ip of rank %d is an address in the rank table", rank)
	}
	return place, nil
}
