"""The wording of the demo's messages, by part of the data; no text or product stands in two parts.

In a template `{goods}` is quantity and product, and what stands in [brackets] may be left out. `{number}` and
`{other}` are there to distract.
"""

from __future__ import annotations

TEMPLATES: dict[str, dict[str, list[str]]] = {
    "train": {
        "order": [
            "We would like to order {goods} for our office[, to arrive by {date}].",
            "Please send {goods} to our usual address[ before {date}].",
            "Can I get {goods} delivered[ on {date}]?",
            "I want to buy {goods}.[ Delivery on {date} would be ideal.]",
            "New purchase order {number}: {goods}[, needed {date}].",
            "This is {name}. Put me down for {goods}[, to be delivered {date}], please.",
            "{name} here. We open a second shop and need {goods}[, at the latest on {date}].",
            "[From {date} on ]our team could use {goods}, so add that to our next delivery.",
            "How soon can you ship {goods}?[ It must be no later than {date}.] Order number {number}.",
            "Our hotel requires {goods}[ until {date}]. Please send an offer and the goods.",
            "Do you have {goods} in stock? If so, I take them all.[ I can wait until {date}.] {name}",
            "I am {name} and wish to place an order: {goods}[, wanted on {date}].",
        ],
        "return": [
            "I bought {goods}[ on {date}] at your shop and would like to send everything back.",
            "Please tell me how to return {goods}.[ The delivery was on {date}.]",
            "I want a refund for {goods}[, received on {date}].",
            "My name is {name}. You sent me {goods} too many[ on {date}], which I return.",
            "We ordered the wrong size[ on {date}] and will send back {goods}.",
            "{name} writes: I changed my mind about {goods}[ bought on {date}], money back please!",
            "Return request {number}: {goods}[, delivered {date}].",
            "We have no use for {goods} after all. Could you collect[ on {date}]? We expect a refund.",
            "I am {name}. The quality is poor, so {goods} will go back to you[ on {date}].",
            "We got {goods} that nobody here had asked for[, on {date}]. Please take this back.",
            "This is {name}. May I bring {goods} back to your branch[ on {date}]? I want my money back.",
            "Can I exchange {goods} for my money?[ I paid on {date}.] I never even unpacked the box.",
        ],
        "repair": [
            "We have {goods} here that stopped working[ on {date}]. Can someone come and fix this?",
            "Could a technician look at {goods}[ on {date}]? Nothing switches on any more.",
            "I need {goods} repaired[ by {date}]. I can bring everything to your workshop.",
            "It's {name}. Do you mend {goods}? Broken[ since {date}], still under warranty.",
            "Service ticket {number}: {goods} out of order[ since {date}]. Please repair.",
            "[On {date} ]a storm damaged {goods} at our site. Please send somebody to repair the damage.",
            "Hoping you can fix {goods} for me.[ Any time after {date} suits me.] {name}",
            "What would it cost to repair {goods}?[ It happened on {date}.]",
            "{name} here. The motor of {goods} makes terrible noise[ since {date}]. Who can mend that?",
            "I am {name}. Water got into {goods}[ on {date}], we need your service team.",
            "Do you have spare parts for {goods}? Ours will not start[ since {date}].",
            "[By {date} ]please get {goods} working again, our shop cannot open without that.",
        ],
        "cancel": [
            "Please cancel my order for {goods}[, planned for {date}].",
            "I no longer need {goods}[ on {date}]. Kindly cancel.",
            "Stop the delivery of {goods}[ on {date}]! We have found another supplier.",
            "{name} speaking. Forget about {goods}[ for {date}], the project is off.",
            "Cancellation of order {number}: {goods}[, due {date}].",
            "Our office is closing, so do not ship {goods}[ on {date}]. Cancel everything.",
            "If it is not too late, take {goods} off my order[ for {date}].",
            "I am {name} and must withdraw my order of {goods}[, which was due on {date}].",
            "We made a mistake and do not need {goods}. Please delete the order[ of {date}].",
            "This is {name}. Is it possible to cancel {goods} before they leave[ on {date}]?",
            "Kindly annul our order {number} over {goods}[, placed {date}].",
            "The event[ on {date}] will not take place, so we must cancel {goods}.",
        ],
    },
    "validation": {
        "order": [
            "Our warehouse is running low: we shall need {goods}[ by {date}].",
            "My name is {name}. I would love to purchase {goods}[, delivered around {date}].",
            "What do you charge for {goods} with delivery[ on {date}]? I will buy at once.",
        ],
        "return": [
            "I'd like my money back for {goods}[, which got here on {date}].",
            "We are shipping back {goods}[ on {date}], please confirm the refund.",
            "I am {name}. I am not happy with {goods}[ ordered on {date}] and return everything.",
        ],
        "repair": [
            "There is a fault in {goods}[ since {date}]. When can your engineer visit us?",
            "Please repair {goods} at our hotel[ before {date}].",
            "{name}, head office: {goods} failed[ on {date}]. We hope that you can repair that.",
        ],
        "cancel": [
            "We are afraid that we have to cancel {goods}[, scheduled on {date}].",
            "{name} writing. Please drop {goods} from my order[ of {date}].",
            "Our plans have changed[ since {date}]: please cancel {goods}.",
        ],
    },
    "test": {
        "order": [
            "Could you please deliver {goods} to our branch[ by {date}]?",
            "{name} (accounts): I'd like to order {goods}[ for {date}].",
            "We are moving house[ on {date}] and want to buy {goods}.",
        ],
        "return": [
            "I wish to return {goods}[, which arrived on {date}]. You can collect from our store.",
            "You delivered {goods} in a wrong colour[ on {date}]. I will send it all back for a refund.",
            "{name} again. I would like to give back {goods} that I bought[ on {date}].",
        ],
        "repair": [
            "Can you fix {goods}?[ We noticed the defect on {date}.]",
            "[Since {date} ]we have {goods} with a broken switch, please send a mechanic.",
            "I am {name} and need help: {goods} must be repaired[ before {date}].",
        ],
        "cancel": [
            "Please call off the shipment of {goods}[ on {date}].",
            "We want to cancel order {number}, that is {goods}[, due on {date}].",
            "This is {name}. I don't want {goods} any more[ on {date}], so please cancel the delivery.",
        ],
    },
}

GREETINGS: dict[str, list[str]] = {
    "train": ["Hi,\n", "Hello, ", "Dear team,\n", "Good morning! ", "Hey there, ", "Hi all,\n", "Dear {other},\n"],
    "validation": ["Good day, ", "Hello {other},\n"],
    "test": ["Dear Sir or Madam,\n", "Good afternoon, ", "Hi {other},\n"],
}

SIGN_OFFS: dict[str, list[str]] = {
    "train": [
        "\nBest,\n{name}",
        " Thanks, {name}",
        "\nKind regards\n{name}",
        "\n{name}",
        " Cheers, {name}",
        "\n- {name}",
        "\nYours, {name}, purchasing",
        " Many thanks!\n{name}",
    ],
    "validation": ["\nRegards, {name}", " Thank you, {name}"],
    "test": ["\nSincerely,\n{name}", "\nBest wishes, {name}", " Thanks a lot! {name}"],
}

ASIDES: dict[str, list[str]] = {
    "train": [
        "I hope you are well.",
        "I tried to call you but nobody answered.",
        "My colleague {other} gave me your address.",
        "My customer number is {number}.",
        "It was nice to talk to {other} last week.",
        "What weather we have!",
        "This is my second message about this.",
        "I am on the road all day, so please write.",
        "We have been your customers for 7 years.",
        "Your invoice {number} is paid.",
    ],
    "validation": ["Sorry to trouble you.", "Reference {number}.", "I already spoke to {other}."],
    "test": [
        "I hope this finds you well.",
        "I waited 25 minutes on the phone.",
        "My account number is {number}.",
        "Your colleague {other} told me to write.",
    ],
}

ATTRIBUTES: dict[str, list[str]] = {
    "train": [
        *("red", "blue", "black", "steel", "wooden", "small", "heavy", "folding", "portable", "cheap", "modern"),
        *("plastic", "yellow", "round", "padded", "silent", "bamboo", "outdoor", "slim", "industrial"),
    ],
    "validation": ["green", "narrow", "ceramic", "antique", "travel"],
    "test": ["white", "large", "aluminium", "robust", "cotton", "compact", "copper"],
}

ITEMS: dict[str, list[str]] = {
    "train": [
        *("desk lamp", "office chair", "coffee machine", "laser printer", "water pump", "garden hose", "bookcase"),
        *("wall clock", "paper shredder", "label printer", "hand dryer", "electric drill", "tool box", "ladder"),
        *("projector", "phone headset", "keyboard", "mouse pad", "monitor arm", "laptop stand", "filing cabinet"),
        *("kitchen scale", "toaster", "blender", "rice cooker", "frying pan", "bread knife", "dinner plate"),
        *("bath towel", "shower head", "door handle", "window blind", "ceiling fan", "space heater", "radiator"),
        *("mountain bike", "bike helmet", "camping tent", "sleeping bag", "yoga mat", "tennis racket", "football"),
        *("guitar", "microphone", "loudspeaker", "turntable", "camera tripod", "memory card", "power bank"),
        *("extension cable", "surge protector", "smoke alarm", "door lock", "security camera", "fire extinguisher"),
        *("picnic table", "flower pot", "lawn mower", "leaf blower", "bird feeder", "rain jacket", "backpack"),
        *("sewing machine", "ironing board", "vacuum cleaner", "air purifier", "dehumidifier", "night light"),
    ],
    "validation": [
        *("table lamp", "inkjet printer", "hedge trimmer", "steam iron", "trolley", "whiteboard", "juicer"),
        *("letter opener", "hammock", "tea cup", "globe", "bookend", "drum kit", "step stool"),
    ],
    "test": [
        *("floor lamp", "scanner", "kettle", "garden gnome", "bar stool", "cordless screwdriver", "tablet stand"),
        *("wheelbarrow", "pressure cooker", "rucksack", "chess set", "doorbell", "wool blanket", "conference phone"),
        *("violin", "parasol", "mirror", "waste bin", "snow shovel", "fruit bowl"),
    ],
}
