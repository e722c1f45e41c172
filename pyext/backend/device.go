// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"fmt"

	"github.com/llm-datadist-open/llm-datadist/capi/cann"
	"github.com/llm-datadist-open/llm-datadist/core/engine"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
)

// chosen is where DEVICE memory lies, who moves its bytes, and what the log is told of that.
type chosen struct {
	device  mem.Device
	library func(name uint64) (native.Library, error) // nil: no vendor's
	why     string
}

// choose follows open.Device. Where a device is asked for that can't be had, that is an error; auto then is the host.
func choose(o engine.Options) (chosen, error) {
	const host = "DEVICE memory is host memory: "
	if o.Device == "host" {
		return chosen{device: mem.Host(), why: host + "open.Device is host"}, nil
	}
	err := findDevice(o)
	if err == nil {
		return onDevice(o), nil
	}
	if o.Device == "cann" {
		return chosen{}, err
	}
	return chosen{device: mem.Host(), why: host + status.From(err, status.StageCheck).Cause}, nil
}

// findDevice loads the vendor's libraries and asks for the device.
func findDevice(o engine.Options) error {
	if err := cann.Load(o.LibraryPath); err != nil {
		return err
	}
	devices, err := cann.Devices()
	if err != nil {
		return err
	}
	if o.SeveralDevices {
		return status.New(status.FeatureNotEnabled, status.StageCheck, "one engine has one NPU, and several ids were given").
			Hinting("make an engine for each device, or set open.Device to host")
	}
	if int(o.DeviceID) >= devices {
		return status.Newf(status.ParamInvalid, status.StageCheck, "there is no device %d: the vendor's runtime has %d", o.DeviceID, devices)
	}
	return nil
}

// everywhere is where the library listens for the objects of peers, where no address was given to listen at.
const everywhere = "0.0.0.0"

func onDevice(o engine.Options) chosen {
	listen := o.ListenIP
	if listen == "" {
		listen = everywhere
	}
	return chosen{
		device: cann.NewDevice(o.DeviceID),
		library: func(name uint64) (native.Library, error) {
			return cann.Open(cann.Config{
				Name: name, Device: o.DeviceID, ListenIP: listen, Timeout: o.SyncTimeout, LocalCommRes: o.LocalCommRes,
				Options: o.LibraryOptions,
			})
		},
		why: fmt.Sprintf("DEVICE memory is that of NPU %d, by way of %s", o.DeviceID, cann.Loaded()),
	}
}
